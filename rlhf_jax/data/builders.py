"""Opens files and prepared TFDS datasets, and gives their rows.

A local file is written once as a TFDS dataset of array_record files, and again only when its
content changes. The rows keep the order of the file, because TFDS's own shuffling is switched off,
and each keeps its file and line. TensorFlow is never imported.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax import storage
from rlhf_jax.data.schema import BadRow, at

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_NAME = "local_rows"
_CACHE_VERSION = "3"  # part of the cache key: raise it when what is stored for a row changes
_CHUNK = 256
# What a file may hold, decompressed: a small .gz can hold more than any memory. The rows of a line
# take about eight times its bytes while they are read.
MAX_LINE = 64 * 2**20  # bytes of a line of a .jsonl file
MAX_BLANK = 1_000_000  # lines without a row, one after another
MAX_ARRAY = 512 * 2**20  # bytes of a .json file, which is parsed as a whole
_REPEATED = "\0repeated"  # a field that marks an object in which some field is given twice


class Rows(Sequence):
    """The rows of a dataset by position: `rows[i]` is (row, where it stands, for error messages).

    Under `on_bad_row="drop"`, a line that cannot be read gives its error text in place of a row.
    """

    def __init__(self, source: Any, name: str, features: Any):
        self._source = source
        self._name = name
        self._features = features
        self._is_local_file = set(features) == {"row", "file", "line"}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | str, str]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self._name}: row {index} of {len(self)}")
        return self._read(position, self._source[position])

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | str, str]]:
        # Reading many records in one call is ten times faster than reading them one by one.
        for start in range(0, len(self), _CHUNK):
            positions = range(start, min(start + _CHUNK, len(self)))
            for position, record in zip(positions, self._source.__getitems__(list(positions))):
                yield self._read(position, record)

    def _read(self, position: int, record: dict[str, Any]) -> tuple[dict[str, Any] | str, str]:
        if self._is_local_file:
            where = _where(record["file"].decode(), int(record["line"]))
            return json.loads(record["row"]), where
        where = f"{self._name} row {position + 1}"
        with at(where):
            row = {
                field: _plain(value, self._features[field], field)
                for field, value in record.items()
            }
        return row, where


def load(
    source: str | os.PathLike,
    split: str = "train",
    cache: str | os.PathLike | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
) -> Rows:
    """Opens a dataset: a .jsonl or .json file (or .gz), a prepared TFDS folder, or a TFDS name.

    A file is a dataset whose only split is "train". It is stored under `cache`, by default the
    folder that the variable RLHF_JAX_CACHE names, or else ~/.cache/rlhf_jax. For a TFDS name
    ("c4/en", "huggingface:org__name") `cache` is TFDS's data folder. The dataset must be prepared
    there already, because nothing is downloaded. `split` is anything that TFDS understands, such as
    "train[:90%]".

    Raises ValueError, on one line, for a source that is missing, unreadable or of another kind, and
    for a damaged file with the line at which it is damaged. With `on_bad_row="drop"`, a line of
    a .jsonl file that cannot be read gives its error text, which the functions of `batches` drop
    and count under the same setting. Damage after which the lost rows cannot be counted (a cut-off
    .gz, a .json file that does not parse) is always an error.
    """
    path = storage.path(source).expanduser()
    storage.check_file(path)
    if path.is_file():
        builder = _open(_cached_folder(path, cache, on_bad_row))
    elif path.is_dir():
        builder = _open(path)
    elif str(source).startswith((".", "~", os.sep)) or path.suffix in (".gz", ".json", ".jsonl"):
        raise ValueError(f"{source}: no such file or folder; check the path")
    else:
        builder = _registered(str(source), cache)
    try:
        rows = builder.as_data_source(split=split)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{source}: cannot read split {split!r} ({_first_line(error)}); "
            f"it has {sorted(builder.info.splits)}"
        ) from None
    except NotImplementedError as error:
        raise ValueError(
            f"{source}: its files cannot be read by position ({_first_line(error)}); "
            "prepare the dataset again with file_format='array_record'"
        ) from None
    return Rows(rows, f"{builder.info.full_name}:{split}", builder.info.features)


class _Line(NamedTuple):
    """One row of a file and its number, from 1: the line in .jsonl, the place in a .json array."""

    row: dict[str, Any] | str
    number: int


def _where(file: str, number: int) -> str:
    is_lines = file.lower().removesuffix(".gz").endswith(".jsonl")
    return f"{file}:{number}" if is_lines else f"{file} row {number}"


def _cached_folder(
    path: storage.Path, cache: str | os.PathLike | None, on_bad_row: str
) -> pathlib.Path:
    """The TFDS folder of a local file; it is written unless the same content is there already."""
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; {', '.join(SUFFIXES)} are read")
    key = _content_hash(path, on_bad_row)
    folder = pathlib.Path(cache or os.environ.get("RLHF_JAX_CACHE") or "~/.cache/rlhf_jax")
    folder = folder.expanduser()
    target = folder / key
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise ValueError(
            f"{folder}: the cache folder cannot be written ({error.strerror}); "
            "set RLHF_JAX_CACHE to one that can"
        ) from None
    try:
        written = _write(path, work, on_bad_row)
        try:
            # Of several processes the first to rename wins. The content is the same, so the others
            # use the winner's folder.
            written.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work)
    return target


def _content_hash(path: storage.Path, on_bad_row: str) -> str:
    # The name is a part of the key because it is stored with every row.
    digest = hashlib.sha256(f"{_CACHE_VERSION}\n{on_bad_row}\n{path.name}\n".encode())
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check permissions") from None
    return digest.hexdigest()[:32]


def _write(path: storage.Path, work: pathlib.Path, on_bad_row: str) -> pathlib.Path:
    """Writes the file's rows as a TFDS dataset somewhere below `work`; returns its folder."""
    lines = _rows_of(path, on_bad_row)
    # TFDS reports an empty dataset by an assertion that names no file, so look at one row first.
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{path.name}: no row in this file; it takes one object or more")

    def examples():
        yield first
        yield from lines

    import tensorflow_datasets as tfds

    class LocalRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows of one local file, each as JSON text with its file and line."""

        name = _NAME
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "row": tfds.features.Text(),
                "file": tfds.features.Text(),
                "line": tfds.features.Scalar(dtype=np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Rows of one local file, as JSON.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (row, number) in enumerate(examples()):
                yield i, {"row": json.dumps(row), "file": path.name, "line": number}

    builder = LocalRows(data_dir=work, file_format="array_record")
    # TFDS prints progress bars and banners about a download, which does not happen here.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def _rows_of(path: storage.Path, on_bad_row: str) -> Iterator[_Line]:
    is_lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    return _json_lines(path, on_bad_row) if is_lines else _json_array(path)


def _raw_lines(path: storage.Path, limit: int) -> Iterator[bytes]:
    """Lines of a plain or gzip file, split only at line feeds: JSON may contain U+2028.

    Of a line of more than `limit` bytes the first `limit` + 1 are given, and the rest is skipped.
    """
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            if path.name.lower().endswith(".gz"):
                file = stack.enter_context(gzip.open(file))
            while line := file.readline(limit + 1):
                done += 1
                rest = line
                while len(rest) > limit and not rest.endswith(b"\n"):
                    rest = file.readline(limit + 1)
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path.name}: the gzip data is damaged or cut off after line {done} "
            f"({_first_line(error)}); fetch or write the file again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the file") from None


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not valid UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from None


def _json_lines(path: storage.Path, on_bad_row: str) -> Iterator[_Line]:
    blank = 0
    for number, line in enumerate(_raw_lines(path, MAX_LINE), 1):
        blank = blank + 1 if line.isspace() else 0
        if blank > MAX_BLANK:
            raise ValueError(
                f"{path.name}:{number}: more than {MAX_BLANK:,} blank lines in a row; write the "
                "file again without them"
            )
        try:
            row = _row(line)
        except BadRow as error:
            if on_bad_row == "error":
                raise BadRow(f"{path.name}:{number}: {error}") from None
            row = str(error)
        if row is not None:
            yield _Line(row, number)


def _row(line: bytes) -> dict[str, Any] | None:
    if len(line) > MAX_LINE:
        raise BadRow(f"the line has more than {MAX_LINE:,} bytes, the limit; cut or remove it")
    text = _decoded(line)
    if not text.strip():
        return None  # a blank line holds no row, so nothing is lost
    try:
        row, repeated = _parsed(text)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"malformed JSON ({error.msg}, column {error.colno}); "
            "a .jsonl file has one complete object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # too long a number, or brackets nested too deep
        raise BadRow(f"unusable JSON ({error}); correct the line") from None
    if repeated:
        raise BadRow(f"the field {repeated[0]!r} is given twice; remove one")
    return _object(row)


def _parsed(text: str) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the fields that any object in it has twice."""
    repeated: list[str] = []
    return json.loads(text, object_pairs_hook=functools.partial(_fields, repeated)), repeated


def _fields(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated.append(next(name for name in names if names.count(name) > 1))
        found[_REPEATED] = True
    return found


def _json_array(path: storage.Path) -> Iterator[_Line]:
    lines, size = [], 0
    for number, line in enumerate(_raw_lines(path, MAX_ARRAY), 1):
        size += len(line)
        if size > MAX_ARRAY:
            raise ValueError(
                f"{path.name}: the file holds more than {MAX_ARRAY:,} bytes, the limit of a .json "
                "file, which is parsed as a whole; write one object a line, as .jsonl"
            )
        with at(f"{path.name}:{number}"):
            lines.append(_decoded(line))
    try:
        rows, repeated = _parsed("".join(lines))
    except json.JSONDecodeError as error:
        remedy = "a .json file holds one array of objects; one object a line is .jsonl"
        raise ValueError(
            f"{path.name}:{error.lineno}: malformed JSON ({error.msg}, column {error.colno}); "
            f"{remedy}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: unusable JSON ({error}); correct the file") from None
    if not isinstance(rows, list):
        raise ValueError(
            f"{path.name}: holds {_kind(rows)}, not an array; a .json file holds one array of "
            "objects"
        )
    for number, row in enumerate(rows, 1):
        with at(_where(path.name, number)):
            if repeated and repr(_REPEATED) in repr(row):
                raise BadRow(f"the field {repeated[0]!r} is given twice; remove one")
            row = _object(row)
        yield _Line(row, number)


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(
            f"the row is {_kind(row)}; it must be an object of named fields, "
            'such as {"prompt": ..., "completion": ...}'
        )
    return row


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _open(folder: pathlib.Path) -> Any:
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"{folder}: not a prepared TFDS folder (no dataset_info.json); name the folder of one "
            f"version, or a file ({', '.join(SUFFIXES)})"
        )
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        return tfds.builder_from_directory(folder)
    except ParseError:
        raise ValueError(
            f"{folder / 'dataset_info.json'}: not TFDS's; name a file of the folder, or one of "
            "LLaMA-Factory's datasets as dataset_info.json:NAME"
        ) from None


def _registered(name: str, data_dir: str | os.PathLike | None) -> Any:
    import tensorflow_datasets as tfds

    # Given the full name, TFDS asks the hub even for a dataset that is prepared.
    prepared = name.removeprefix("huggingface:").lower()
    try:
        builder = tfds.builder(prepared, data_dir=data_dir, try_gcs=False)
        if builder.is_prepared():
            return builder
        place = builder.data_dir
    except (ValueError, ImportError, tfds.core.DatasetNotFoundError) as error:
        if prepared == name.lower():
            raise ValueError(
                f"{name}: neither a file, nor a folder, nor a TFDS dataset ({_first_line(error)}); "
                "check the spelling, and TFDS_DATA_DIR for a prepared one"
            ) from None
        place = data_dir or "TFDS_DATA_DIR"
    raise ValueError(
        f"{name}: not prepared under {place}; run tfds.builder({name!r}, "
        "file_format='array_record').download_and_prepare(), or set TFDS_DATA_DIR"
    )


def _plain(value: Any, feature: Any, field: str) -> Any:
    """A value that TFDS has read, as plain Python: bytes to text, arrays to lists, and so on.

    `feature` is TFDS's description of the value. TFDS gives a list of objects (messages) as one
    object of lists, or as a data source of its own; both become a list of objects again.
    """
    inner = getattr(feature, "feature", None)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BadRow(
                f"{field!r} is not valid UTF-8; prepare the dataset with text in it"
            ) from None
    if isinstance(value, dict) and inner is not None:
        value = [dict(zip(value, items)) for items in zip(*value.values())]
    if isinstance(value, dict):
        return {name: _plain(x, feature[name], f"{field}.{name}") for name, x in value.items()}
    if isinstance(value, np.ndarray | np.generic) and inner is None:
        value = value.tolist()
        if isinstance(value, bytes):
            return _plain(value, feature, field)
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        return [_plain(x, inner or feature, field) for x in value]
    return value


def _first_line(error: Exception) -> str:
    # The str() of a KeyError is the repr of its text, with quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.splitlines() or [type(error).__name__])[0]
