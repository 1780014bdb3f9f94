"""A row of a batch as text, for people."""

from __future__ import annotations

import numpy as np

from rlhf_jax.data.records import Batch, Comparisons, Demonstrations, Prompts, Steps
from rlhf_jax.data.tokenizers import Tokenizer


def show(row: Batch, tokenizer: Tokenizer) -> str:
    """One row (`examples[i]`) as text, with what SFT trains on between ⟦ and ⟧.

    EOS is written out, padding is not. A comparison takes one line per response, best first. Of
    steps, each is followed by its label, between ⟦ and ⟧ too.
    """
    match row:
        case Demonstrations(tokens, attend, mask):
            return _marked(tokens[attend > 0], mask[attend > 0], tokenizer)
        case Prompts(tokens, attend):
            return _marked(tokens[attend > 0], np.zeros(np.sum(attend > 0)), tokenizer)
        case Steps(tokens, attend, marks, labels, _):
            return _labelled(tokens[attend > 0], marks[attend > 0], labels[attend > 0], tokenizer)
        case Comparisons(tokens, attend, _, ranks, present, margin, _):
            lines = [f"margin {float(margin):g}"] if margin else []
            last = np.iinfo(np.int32).max
            for k in np.argsort(np.where(present > 0, ranks, last), kind="stable"):
                if present[k] > 0:
                    ids = tokens[k][attend[k] > 0]
                    lines.append(f"rank {ranks[k]}: {_marked(ids, np.zeros(len(ids)), tokenizer)}")
            return "\n".join(lines)


def _labelled(ids: np.ndarray, marks: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> str:
    parts, before = [], ""
    for end in np.flatnonzero(marks):
        text = tokenizer.decode(ids[: end + 1])
        parts.append(f"{text[len(before) :]}⟦{labels[end]:g}⟧")
        before = text
    return "".join(parts)


def _marked(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> str:
    # At the first position an EOS id is the BOS: some tokenizers use one id for both.
    ends = [i for i in range(1, len(ids)) if int(ids[i]) in tokenizer.eos_ids]
    changes = (np.flatnonzero(np.diff(mask)) + 1).tolist()
    edges = sorted({0, len(ids), *changes, *ends, *(i + 1 for i in ends)})
    parts, before, inside = [], "", False
    for start, stop in zip(edges, edges[1:]):
        if (mask[start] > 0) != inside:
            parts.append("⟧" if inside else "⟦")
            inside = not inside
        # The difference of two decodings keeps the spaces that decoding a part alone drops.
        text = tokenizer.decode(ids[:stop])
        parts.append("<eos>" if start in ends else text[len(before) :])
        before = text
    return "".join(parts) + "⟧" * inside
