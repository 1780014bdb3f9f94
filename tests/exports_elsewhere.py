"""Exported folders, read by transformers alone: its logits and texts are those that were made here.

Another release of transformers than the installed one needs an environment of its own, without
this library:

    python tests/exports_elsewhere.py write exports
    python -m venv other && other/bin/pip install 'transformers==4.57.*' torch jinja2
    other/bin/python tests/exports_elsewhere.py read exports

The second command of this file prints the largest differences of logits and scores, or fails where
ids or texts differ. What it printed is stored in `exports_elsewhere.json`; `test_exports.py` reads
the same folders with the installed release.
"""

import json
import pathlib
import sys

TEMPLATES = {
    # Text after EOS, as in ChatML.
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + eos_token }}"
        "{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
    ),
    # Nothing after EOS, as in Llama 3.
    "llama3": (
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim }}"
        "{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
    ),
    # No EOS at all.
    "no eos": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
ASKED = [
    {"role": "user", "content": "Which colours?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Which else?"},
]
ANSWERS = ["Blue, and green.", "None", "黄。"]
PROMPT = "Once upon a time"


def write(folder: pathlib.Path) -> None:
    """Exports a language model, reward models, and a Gemma 3, each with what it says here."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    import tiny

    from rlhf_jax import folders
    from rlhf_jax.algorithms import reward_model
    from rlhf_jax.data import batches
    from rlhf_jax.models import heads, transformer

    init = jax.jit(transformer.init, static_argnums=0)
    shape = dataclasses.replace(tiny.SHAPE, max_length=256)
    model = init(shape, jax.random.key(0))
    scorer = heads.init_scorer(model, jax.random.key(1))
    head = {"kernel": 10 * scorer.weights["score"]["kernel"], "bias": jnp.ones(1)}
    scorer = transformer.Model(shape, scorer.weights | {"score": head})
    scorer = transformer.without_score_bias(scorer)

    def logits(model, ids):
        tokens = jnp.asarray([ids])
        hidden = transformer.hidden_states(model, tokens, jnp.ones_like(tokens))
        return np.asarray(transformer.logits(model, hidden))[0, -1].tolist()

    def record(name, **expected):
        (folder / name / "expected.json").write_text(json.dumps(expected))

    ids = tiny.TOKENIZER.encode_prompt(PROMPT)
    folders.export(folder / "llama", model, tiny.TOKENIZER)
    record("llama", ids=ids, logits=logits(model, ids))

    gemma = dataclasses.replace(
        shape,
        norm="rms_plus_one",
        embed_scale=True,
        post_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        tied=True,
    )
    full = init(gemma, jax.random.key(2))
    folders.export(folder / "gemma3", full, tiny.TOKENIZER)
    record("gemma3", ids=ids, logits=logits(full, ids))

    for name, template in TEMPLATES.items():
        tokenizer = tiny.TOKENIZER.with_template(template)
        folders.export(folder / f"reward {name}", scorer, tokenizer)
        rows = [{"prompt": p, "responses": ANSWERS, "ranks": [1, 2, 3]} for p in (ASKED, PROMPT)]
        expected = {}
        for kind, row in zip(("messages", "text"), rows):
            found = batches.comparisons([row], tokenizer, 150, 50).gather(np.array([0]))
            scores = reward_model.score_batch(scorer, found)[0]
            tokens = [t[on > 0].tolist() for t, on in zip(found.tokens[0], found.attend[0])]
            expected[kind] = {"ids": tokens, "scores": scores.tolist()}
        record(f"reward {name}", **expected)


def read(folder: pathlib.Path) -> dict:
    """Reads every folder with transformers: the largest difference of its numbers from ours."""
    differences = {}
    for case in sorted(folder.iterdir()):
        expected = json.loads((case / "expected.json").read_text())
        check = _read_scores if case.name.startswith("reward") else _read_logits
        differences[case.name] = check(case, expected)
    import torch
    import transformers

    releases = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {**releases, "differences": differences}


def _read_logits(case: pathlib.Path, expected: dict) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(case).eval()
    inputs = AutoTokenizer.from_pretrained(case)(PROMPT, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expected["ids"]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    # What the tokenizer gives goes into `generate` as it is.
    said = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert said[0, -1] == logits.argmax()
    return float((logits - torch.tensor(expected["logits"])).abs().max())


def _read_scores(case: pathlib.Path, expected: dict) -> float:
    """Scores of messages through the folder's chat template, and of text that ends with EOS."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case)
    model = AutoModelForSequenceClassification.from_pretrained(case).eval()
    rendered = [
        tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": x}], tokenize=False)
        for x in ANSWERS
    ]
    asked = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert all(text.startswith(asked) for text in rendered)
    largest = 0.0
    for kind, texts in (
        ("messages", rendered),
        ("text", [PROMPT + x + tokenizer.eos_token for x in ANSWERS]),
    ):
        ids, scores = expected[kind]["ids"], torch.tensor(expected[kind]["scores"])
        assert tokenizer(texts, add_special_tokens=False)["input_ids"] == ids
        together = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = [
                model(**together).logits[:, 0],
                torch.cat([model(torch.tensor([one])).logits[:, 0] for one in ids]),
            ]
        largest = max(largest, *(float((x - scores).abs().max()) for x in found))
    return largest


if __name__ == "__main__":
    command, where = sys.argv[1:]
    if command == "write":
        write(pathlib.Path(where))
    else:
        print(json.dumps(read(pathlib.Path(where)), indent=2))
