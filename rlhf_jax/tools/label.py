"""Makes a page on which people rank, compare or score answers; what they download is training data.

    rlhf-jax-label answers.jsonl --output label.html
    rlhf-jax-label runs/quickstart --output label.html --task pairs
    rlhf-jax-label answers.jsonl --output label.html --task score --scale 5

`answers.jsonl` holds rows of `prompt` and `responses`, which `rlhf-jax-respond` samples from a
checkpoint. The folder of a run works as well; its samples are then labelled.

The page is a single file that can be opened in a browser or sent by mail. It needs neither a server
nor a network, its interface is in English and Chinese, and the browser remembers the progress. Its
download button writes one row per item in a format that this library trains on:

    two answers, one better     prompt, chosen, rejected
    more answers, or a tie      prompt, responses, ranks (0 is best, equal ranks are ties)
    scores                      prompt, responses, scores

Items that were skipped are left out of the download.

The position on the screen cannot bias the labels: the answers to each prompt are shown in an order
that is drawn from the seed, and are written in the order of the input.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Annotated, Literal

import tyro

from rlhf_jax.launch import command
from rlhf_jax.tools import pages

MAX_RANKED = 9  # answers on one screen, lettered A to I; people cannot order many more


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
        output: the page to write, an .html file
        task: rank all answers to a prompt, compare every two of them, or score each
        scale: the highest score, from 2 to 10 (only for the task score)
        seed: determines the order in which the answers are shown
    """
    if not 2 <= scale <= 10:
        raise ValueError(f"--scale {scale}: the highest score must be a number from 2 to 10")
    if seed < 0:
        raise ValueError(f"--seed {seed} must be at least 0")
    pages.check_output(output, answers)
    found = pages.read(answers)
    unique = [(prompt, distinct(responses)) for prompt, responses, _ in found]
    least = 1 if task == "score" else 2
    enough = [(prompt, responses) for prompt, responses in unique if len(responses) >= least]
    if task == "pairs":
        items = [(p, list(pair)) for p, rs in enough for pair in itertools.combinations(rs, 2)]
    else:
        items = enough
    for prompt, responses in items:
        if len(responses) > MAX_RANKED:
            raise ValueError(
                f"{answers}: {prompt!r:.60} has {len(responses)} answers, but at most {MAX_RANKED} "
                "are shown side by side; choose --task pairs or leave some answers out"
            )
    if not items:
        raise ValueError(
            f"{answers}: no prompt has {least} different answers; sample more answers per prompt"
        )
    content = {
        "kind": "label",
        "scale": scale if task == "score" else None,
        "items": [shown(seed, i, *item) for i, item in enumerate(items)],
    }
    pages.write(output, output.stem, content)
    given, left = (sum(len(rs) for _, rs, *_ in rows) for rows in (found, unique))
    print(
        f"{output}: {len(items)} items to label; left out: {given - left} answers that are empty "
        f"or repeat another, {len(unique) - len(enough)} of {len(unique)} prompts because fewer "
        f"than {least} of their answers remain"
    )


def distinct(responses: list[str]) -> list[str]:
    """The answers in their order, without empty ones and repetitions, which nobody can rank."""
    return [text for text in dict.fromkeys(responses) if text.strip()]


def shown(seed: int, position: int, prompt: pages.Prompt, responses: list[str]) -> dict:
    """One item of the page: the answers in the order shown, and `order`, their input positions."""
    order = pages.shuffled(seed, position, len(responses))
    return {"prompt": prompt, "responses": [responses[i] for i in order], "order": order}


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-label`; `argv` defaults to the process's arguments."""
    command(label, argv, description=__doc__)


if __name__ == "__main__":
    main()
