"""The README is a door: short, its blocks run as they stand, and its files are there."""

import pathlib
import re

import jax
import pytest
import tiny

from rlhf_jax import folders
from rlhf_jax.algorithms import ppo
from rlhf_jax.data import tokenizers
from rlhf_jax.models import transformer

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture
def small_llama(tmp_path, monkeypatch):
    """A working folder with the Llama of a few thousand parameters that the README names."""
    tokenizer = tokenizers.byte_tokenizer()
    shape = transformer.Config(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        d_ff=32,
        max_length=128,
    )
    model = transformer.init(shape, jax.random.key(0))
    folders.export(tmp_path / "my-llama", model, tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_python_runs_as_it_stands(small_llama, number):
    scope = {}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), scope)
    if "tuned" in BLOCKS[number]:
        assert (small_llama / "tuned" / "model.safetensors").is_file()
    if "ClipHigher" in scope:
        train_with(scope)


def train_with(scope):
    """The loss of the README with the call that its last line leaves out."""
    config = scope["ClipHigher"](**vars(tiny.PPO) | {"num_iterations": 1})
    result = ppo.run(
        config,
        policy=tiny.model(),
        prompts=tiny.prompts(),
        tokenizer=tiny.TOKENIZER,
        score=tiny.share_below_128,
        loss_fn=scope["loss"],
        runtime=tiny.runtime(),
    )
    assert "policy/clipfrac_avg" in result.history[0]


def test_it_is_a_door_of_at_most_900_words():
    without_code = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    prose = re.sub(r"(?m)^\|.*$", "", without_code)
    assert len(prose.split()) <= 900


def test_every_file_that_it_links_to_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
