"""The notebooks run from top to bottom, and what is committed of them is fit to be read."""

import os
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "notebooks"
FIGURES = {"01_tour.ipynb": 7, "02_swap_the_loss.ipynb": 1}
KILOBYTES = 300


def read(name):
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(FOLDER / name, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def figures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def printed(notebook, stream):
    texts = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == stream]
    return "".join(texts)


def test_every_notebook_is_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_runs_from_top_to_bottom_as_its_reader_would_run_it(name):
    nbclient = pytest.importorskip("nbclient")
    notebook = read(name)
    # One device, not the eight of conftest.py: what a reader has who opens a notebook.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=env)  # raises for a cell that fails, its assertions included
    assert figures(notebook) == FIGURES[name]
    assert printed(notebook, "stderr") == ""


@pytest.mark.parametrize("name", FIGURES)
def test_is_committed_with_its_outputs_small_and_free_of_this_machine(name):
    notebook = read(name)
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert figures(notebook) == FIGURES[name]
    assert printed(notebook, "stdout") and not printed(notebook, "stderr")
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text) < KILOBYTES * 1000
    readable = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(r"/(?:home|root|tmp|usr|Users|work)/\S*|[A-Z]:\\\\\S*", readable)
    assert not re.findall(r"\w*Warning\b|Traceback", readable)
