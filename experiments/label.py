"""A page on which people rank, compare or score answers; its download is training data here.

    python experiments/label.py answers.jsonl --output label.html
    python experiments/label.py runs/quickstart --output label.html --task pairs
    python experiments/label.py answers.jsonl --output label.html --task score --scale 5

`answers.jsonl` holds rows of `prompt` and `responses`, as `respond.py` samples them from a
checkpoint; a run's folder (its samples) will do too. The page is one file: open it in a browser or
mail it. It needs no server and no network, speaks English and Chinese, and keeps the progress in
the browser. Its download button writes `prompt`, `chosen`, `rejected` for a pair, `prompt`,
`responses`, `ranks` (0 is best, equal ranks are ties) for more or for a tie, and `prompt`,
`responses`, `scores` for scores. Items that were skipped are left out.

Claim: position cannot bias the labels. Every item's answers are shown in an order of its own, drawn
from the seed, and written in the order of the input.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from typing import Annotated, Literal

import tyro

from rlhf_jax.launch import command

sys.path.append(str(pathlib.Path(__file__).parent))
import pages

MAX_RANKED = 9  # letters A to I: as many as people can order


def label(
    answers: Annotated[pathlib.Path, tyro.conf.Positional],
    output: pathlib.Path,
    task: Literal["rank", "pairs", "score"] = "rank",
    scale: int = 5,
    seed: int = 0,
) -> None:
    """Writes the page.

    Args:
        answers: file of answers, or folder of a run
        output: the page, an .html file
        task: rank all answers of a prompt, compare each two of them, or score each
        scale: highest score, 2 to 10 (task score)
        seed: of the order in which answers are shown
    """
    if not 2 <= scale <= 10:
        raise ValueError(f"--scale {scale}: scores go from 1 to a number of 2 to 10")
    found = pages.read(answers)
    sets = [(prompt, distinct(responses)) for prompt, responses, _ in found]
    least = 1 if task == "score" else 2
    kept = [(prompt, responses) for prompt, responses in sets if len(responses) >= least]
    if task == "pairs":
        kept = [(p, list(two)) for p, rs in kept for two in itertools.combinations(rs, 2)]
    for prompt, responses in kept:
        if len(responses) > MAX_RANKED:
            raise ValueError(
                f"{answers}: {len(responses)} answers to {prompt!r:.60}; at most {MAX_RANKED} are "
                "shown side by side, so choose --task pairs or leave some out"
            )
    if not kept:
        raise ValueError(
            f"{answers}: no prompt with {least} different answers; sample more of them"
        )
    given = sum(len(responses) for _, responses, _ in found)
    unlike = sum(len(responses) for _, responses in sets)
    few = sum(len(responses) < least for _, responses in sets)
    content = {
        "kind": "label",
        "scale": scale if task == "score" else None,
        "items": [item(seed, i, *one) for i, one in enumerate(kept)],
    }
    pages.write(output, output.stem, content)
    print(
        f"{output}: {len(kept)} items; dropped: {given - unlike} answers that are empty or said "
        f"before, {few} of {len(sets)} prompts with fewer than {least} left"
    )


def distinct(responses: list[str]) -> list[str]:
    """The answers in order, without empty ones and repetitions: nobody can rank those."""
    return [text for text in dict.fromkeys(responses) if text.strip()]


def item(seed: int, position: int, prompt: pages.Prompt, responses: list[str]) -> dict:
    """What the page needs of one item: answers as shown, and the place of each in the input."""
    order = pages.shuffled(seed, position, len(responses))
    return {"prompt": prompt, "responses": [responses[i] for i in order], "order": order}


if __name__ == "__main__":
    command(label)
