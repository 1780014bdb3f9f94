"""Which fields a row of a file has: what `known_formats` recognises a format by.

Formats share fields, so a test also names those that must be absent.
"""

from __future__ import annotations

from rlhf_jax.data.schema import Row

LABELS = ("label", "kto_tag", "tag")  # names of the label of an answer


def has(row: Row, *names: str) -> bool:
    """Whether all of these fields are there."""
    return all(name in row for name in names)


def has_any(row: Row, *names: str) -> bool:
    """Whether one of these fields is there, or several."""
    return any(name in row for name in names)


def has_turns(row: Row) -> bool:
    """A conversation, turn by turn."""
    return has_any(row, "messages", "conversations")


def has_sides(row: Row) -> bool:
    """A better and a worse answer, or one of them."""
    return has_any(row, "chosen", "rejected")


def is_judged(row: Row) -> bool:
    """Two answers and a verdict."""
    return has(row, "response1", "response2") or has(row, "output_1", "output_2")


def is_instruction(row: Row) -> bool:
    """An instruction, with answers that no verdict compares."""
    return "instruction" in row and not is_judged(row)


def has_prompt(row: Row) -> bool:
    """The prompt is the field of that name, not turns or an instruction."""
    return "prompt" in row and not has_turns(row) and not is_instruction(row)


def lists_responses(row: Row) -> bool:
    """A prompt and a list of responses, ranked or scored."""
    return has_prompt(row) and has_any(row, "responses", "ranks", "scores")


def has_unranked_prompt(row: Row) -> bool:
    """A prompt, and at most one answer to it."""
    return has_prompt(row) and not lists_responses(row) and not has_sides(row)


def is_scored(row: Row) -> bool:
    """An answer with a score."""
    return has_unranked_prompt(row) and "score" in row and has_any(row, "response", "completion")


def is_stepwise(row: Row) -> bool:
    """The steps of one answer, each with a label."""
    return has_unranked_prompt(row) and has(row, "completions", "labels")


def is_unranked_instruction(row: Row) -> bool:
    """An instruction with at most one answer."""
    ranked = has_sides(row) or isinstance(row.get("output"), list | tuple)
    return is_instruction(row) and not ranked


def is_labelled(row: Row) -> bool:
    """An answer that is good or bad."""
    if has_turns(row):
        return not has_sides(row) and has_any(row, *LABELS)
    if is_unranked_instruction(row):
        return has_any(row, *LABELS)
    return has_unranked_prompt(row) and has(row, "completion", "label")


def is_dialogue(row: Row) -> bool:
    """Two dialogues, each as one text."""
    other = has_turns(row) or is_instruction(row) or "prompt" in row
    return not other and str(row.get("chosen")).lstrip().startswith("Human:")


def is_preference(row: Row) -> bool:
    """A better and a worse answer to a prompt, or two conversations."""
    if "prompt" in row:
        return has_sides(row) and not is_instruction(row) and not lists_responses(row)
    other = has_turns(row) or is_instruction(row) or is_dialogue(row)
    return has_sides(row) and not other
