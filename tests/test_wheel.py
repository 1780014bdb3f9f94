"""What `pip install` brings: the built wheel, in an empty folder and away from the checkout."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = ("label", "judge", "respond", "chat", "plot")
IMPORT_ALL = """
import pkgutil, sys
import rlhf_jax

for module in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax."):
    __import__(module.name)
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "rlhf_jax":
        print(module.__file__)
"""
SHOW_HELP = """
import contextlib, importlib.metadata, sys

for command in importlib.metadata.distribution("rlhf_jax").entry_points:
    sys.argv = ["/somewhere/bin/" + command.name, "--help"]
    with contextlib.suppress(SystemExit):
        command.load()()
"""


def pip(*arguments):
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", *arguments, *offline]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed into; the programs lie in its `bin`."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    # A copy of the sources: an old `build/` of the checkout would lend the wheel its files.
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "rlhf_jax", source / "rlhf_jax", ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(source / "wheels"))
    (wheel,) = (source / "wheels").glob("*.whl")
    pip("install", str(wheel), "--target", str(target))
    return target


@pytest.fixture
def run(installed, tmp_path):
    """`run(*command)` -> what it prints, started in an empty folder that is not the checkout."""
    # PYTHONPATH stands before every installed package, so before a checkout installed with -e.
    env = {**os.environ, "PYTHONPATH": str(installed), "RLHF_JAX_CACHE": str(tmp_path / "cache")}
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command):
        done = subprocess.run(
            list(map(str, command)), cwd=empty, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_module_of_the_package_is_in_the_wheel_and_imports(installed, run):
    found = {Path(line) for line in run(sys.executable, "-c", IMPORT_ALL).splitlines()}
    names = {str(path.relative_to(installed / "rlhf_jax")) for path in found}
    sources = (REPOSITORY / "rlhf_jax").rglob("*.py")
    assert names == {str(path.relative_to(REPOSITORY / "rlhf_jax")) for path in sources}


def test_the_label_command_writes_its_page_with_style_and_script(installed, run, tmp_path):
    answers, page = tmp_path / "answers.jsonl", tmp_path / "page.html"
    answers.write_text('{"prompt": "Why is the sky blue?", "responses": ["Air.", "The sea."]}\n')
    printed = run(installed / "bin" / "rlhf-jax-label", answers, "--output", page)
    assert "1 items to label" in printed
    text = page.read_text("utf-8")
    for name in ("page.css", "page.js"):
        part = (REPOSITORY / "rlhf_jax" / "tools" / "pages" / name).read_text("utf-8")
        assert part.strip() in text


def test_every_command_shows_in_its_help_how_it_is_called(run):
    shown = run(sys.executable, "-c", SHOW_HELP)
    for name in TOOLS:
        assert f"usage: rlhf-jax-{name} " in shown and f"\n    rlhf-jax-{name} " in shown


def test_the_metadata_state_the_commands_and_the_pythons(installed):
    (folder,) = installed.glob("rlhf_jax-*.dist-info")
    distribution = importlib.metadata.Distribution.at(folder)
    commands = {(x.group, x.name, x.value) for x in distribution.entry_points}
    assert commands == {
        ("console_scripts", f"rlhf-jax-{name}", f"rlhf_jax.tools.{name}:main") for name in TOOLS
    }
    assert distribution.metadata["Requires-Python"] == ">=3.11"
    pythons = {
        line.rpartition(" ")[2]
        for line in distribution.metadata.get_all("Classifier")
        if line.startswith("Programming Language :: Python :: 3.")
    }
    assert pythons == {"3.11", "3.12", "3.13"}
