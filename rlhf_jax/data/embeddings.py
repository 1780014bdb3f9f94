"""Embeddings of the units of a text: from an array, from a file of words, or from a model."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rlhf_jax import sharding, storage
from rlhf_jax.data.schema import shown
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.transformer import Model

_WORD = re.compile(r"\w+|[^\w\s]")  # a run of letters and digits, or one other character


class Embeddings(NamedTuple):
    """A vector for each unit of a text (a word or a part of one)."""

    table: Float[np.ndarray, "V D"]
    # Text -> the rows of its units in `table`, -1 for a unit that has none.
    units: Callable[[str], list[int]]


def from_array(path: str | os.PathLike, tokenizer: Tokenizer) -> Embeddings:
    """A .npy file [V, D] whose row i is the embedding of token i.

    Raises ValueError for a file that is missing or holds no finite numbers of two axes, and for
    one with fewer rows than the tokenizer has tokens.
    """
    file = _existing(path)
    try:
        with file.open("rb") as stream:
            table = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an array of numpy ({error}); write it by np.save") from error
    return _of_tokens(str(path), table, tokenizer)


def from_model(model: Model, tokenizer: Tokenizer) -> Embeddings:
    """The input embeddings of a model [V, D], on the host. All processes must call it.

    Raises ValueError for a model with fewer embeddings than the tokenizer has tokens.
    """
    table = sharding.to_host(model.weights["embed"]["embedding"])
    return _of_tokens("the model", table, tokenizer)


def from_text(path: str | os.PathLike) -> Embeddings:
    """A text file with a word and its D numbers on each line, as word2vec and GloVe write them.

    A first line of two whole numbers, how many words there are and D, may stand above. Words are
    lower-cased, and of those that are then equal the first counts, as they are sorted by frequency.
    A text is lower-cased too and split into words and single punctuation marks.
    Raises ValueError with file and line for a line that is anything else, and for a file that holds
    fewer words than it says, or no text.
    """
    try:
        return _read(path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not text in UTF-8 ({error}); word2vec's binary format is not read, write it "
            "as text"
        ) from error


def _read(path: str | os.PathLike) -> Embeddings:
    rows: dict[str, int] = {}
    vectors, declared, size = [], None, None
    with _existing(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if number == 1 and len(fields) == 2 and all(x.isdecimal() for x in fields):
                declared, size = map(int, fields)
                continue
            size = len(fields) - 1 if size is None else size
            vector = _numbers(fields[-size:]) if 0 < size < len(fields) else None
            if vector is None:
                raise ValueError(
                    f"{path}:{number}: {shown(line.rstrip())} is not a word and {size} finite "
                    "numbers; a file of embeddings has these on every line"
                )
            vectors.append(vector)
            rows.setdefault(" ".join(fields[:-size]).lower(), len(vectors) - 1)
    if not vectors or declared not in (None, len(vectors)):
        raise ValueError(
            f"{path}: holds {len(vectors)} words"
            + (f", but its first line says {declared}" if declared else "")
            + "; the file may have been cut off"
        )
    return Embeddings(np.stack(vectors), functools.partial(_units, rows))


def _units(rows: dict[str, int], text: str) -> list[int]:
    return [rows.get(word, -1) for word in _WORD.findall(text.lower())]


def _token_units(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.lower())


def _numbers(fields: list[str]) -> np.ndarray | None:
    try:
        vector = np.array(fields, np.float32)
    except ValueError:
        return None
    return vector if np.isfinite(vector).all() else None


def _of_tokens(where: str, table: np.ndarray, tokenizer: Tokenizer) -> Embeddings:
    table = np.asarray(table)
    if table.ndim != 2 or table.shape[0] < tokenizer.vocab_size:
        raise ValueError(
            f"{where}: embeddings of shape {list(table.shape)}, but the tokenizer has "
            f"{tokenizer.vocab_size} tokens: [V, D] has a row for each; give the right tokenizer"
        )
    table = table.astype(np.float32)
    if not np.isfinite(table).all():
        raise ValueError(f"{where}: an embedding is not finite; write the array again")
    return Embeddings(table, functools.partial(_token_units, tokenizer))


def _existing(path: str | os.PathLike) -> storage.Path:
    file = storage.path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    return file
