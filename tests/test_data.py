"""rlhf_jax.data: files to rows, rows to examples, examples to batches."""

import dataclasses
import gzip
import itertools
import json
import pathlib
import re
import subprocess
import sys
import threading

import jax
import jaxtyping
import numpy as np
import pytest
import tokenizers

from rlhf_jax.data import batches, builders, formats, mixing
from rlhf_jax.data.batches import Loader, describe, show
from rlhf_jax.data.records import Comparisons, Demonstrations, rating
from rlhf_jax.data.schema import Example, at
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer, from_folder

PAD, EOS = 256, 257
BYTES = byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """Every test has a cache of its own."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_shape_checks():
    """What annotations refuse in the tests is refused by the functions themselves elsewhere."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fails(message: str, function, *args, **kwargs):
    """`function` raises a ValueError whose text is one line matching all of `message`."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def with_bos(bos: int) -> Tokenizer:
    """The byte tokenizer, said to start prompts with `bos`."""
    return Tokenizer(258, PAD, (EOS,), bos, BYTES.backend, {})


# Files to rows.

ROWS = [
    {"prompt": "héllo\u2028wörld", "completion": "a", "tags": ["x", 1, None, {"y": 0.5}]},
    {"text": "only text"},
    {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_every_kind_of_file_gives_the_same_rows_with_file_and_number(tmp_path, name):
    is_lines = "jsonl" in name
    content = lines(*ROWS) if is_lines else json.dumps(ROWS, indent=1)
    rows = builders.load(write(tmp_path / name, content))
    where = [f"{name}:{i}" if is_lines else f"{name} row {i}" for i in (1, 2, 3)]
    assert len(rows) == 3
    assert list(rows) == [rows[i] for i in range(3)] == list(zip(ROWS, where))
    assert rows[-1] == rows[2]
    with pytest.raises(IndexError):
        rows[3]


def test_rows_keep_the_order_of_the_file_past_one_read_and_one_shard(tmp_path):
    rows = builders.load(write(tmp_path / "many.jsonl", lines(*({"i": i} for i in range(700)))))
    assert [(row["i"], where) for row, where in rows] == [
        (i, f"many.jsonl:{i + 1}") for i in range(700)
    ]


def test_blank_lines_and_a_byte_order_mark_are_no_rows_but_count_as_lines(tmp_path):
    rows = builders.load(write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n \r\n{"a": 2}'))
    assert list(rows) == [({"a": 1}, "x.jsonl:1"), ({"a": 2}, "x.jsonl:4")]


def test_a_file_can_be_read_in_part_by_a_split(tmp_path):
    path = write(tmp_path / "x.jsonl", lines(*({"i": i} for i in range(10))))
    parts = [builders.load(path, split=split) for split in ("train[:80%]", "train[80%:]")]
    assert [[row["i"] for row, _ in part] for part in parts] == [list(range(8)), [8, 9]]


def test_a_second_load_reuses_the_cache_and_other_content_gets_its_own_entry(tmp_path, cache):
    path = write(tmp_path / "x.jsonl", lines({"a": 1}))

    def entries():
        files = [path for path in cache.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    builders.load(path)
    before = entries()
    assert before
    assert list(builders.load(path)) == [({"a": 1}, "x.jsonl:1")]
    assert entries() == before
    write(path, lines({"a": 2}))
    assert list(builders.load(path)) == [({"a": 2}, "x.jsonl:1")]
    assert before.items() < entries().items()
    assert len(list(cache.iterdir())) == 2


def test_the_same_content_under_another_name_keeps_its_own_name(tmp_path):
    for name in ("x.jsonl", "y.jsonl"):
        path = write(tmp_path / name, lines({"a": 1}))
        assert builders.load(path)[0][1] == f"{name}:1"


def test_the_cache_folder_can_be_given_and_is_a_dataset_that_tfds_reads(tmp_path, cache):
    path = write(tmp_path / "x.jsonl", lines({"a": 1}))
    builders.load(path, cache=tmp_path / "mine")
    assert not cache.exists()
    (entry,) = (tmp_path / "mine").iterdir()
    assert list(builders.load(entry)) == [({"a": 1}, "x.jsonl:1")]
    info = json.loads((entry / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and info["disableShuffling"]


def test_a_failed_load_leaves_nothing_behind(tmp_path, cache):
    path = write(tmp_path / "x.jsonl", lines(*({"a": i} for i in range(50))) + "{oops\n")
    with pytest.raises(ValueError):
        builders.load(path)
    assert list(cache.iterdir()) == []


def test_several_processes_that_load_one_file_at_once_all_get_its_rows(tmp_path, cache):
    path = write(tmp_path / "x.jsonl", lines(*({"a": i} for i in range(50))))
    code = (
        f"from rlhf_jax.data import builders; rows = list(builders.load({str(path)!r})); "
        "assert [row['a'] for row, _ in rows] == list(range(50))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1  # one entry and no folder of a loser


def test_who_renames_second_uses_what_is_there(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "x.jsonl", lines({"a": 1}))
    write_dataset = builders._write

    def slow_write(path, *rest):
        written = write_dataset(path, *rest)
        monkeypatch.setattr(builders, "_write", write_dataset)
        builders.load(path)  # somebody else finishes first
        return written

    monkeypatch.setattr(builders, "_write", slow_write)
    assert list(builders.load(path)) == [({"a": 1}, "x.jsonl:1")]
    assert len(list(cache.iterdir())) == 1


BAD_FILES = {
    "x.jsonl": [
        (
            '{"a": 1}\n{"a": \n',
            r"x\.jsonl:2: malformed JSON \(Expecting value, column \d\); a \.jsonl file has one .*",
        ),
        ("[1]\n", r"x\.jsonl:1: the row is an array; it must be an object of named fields, .*"),
        ('\n"a"\n', r"x\.jsonl:2: the row is a string; it must be an object of named fields, .*"),
        ("true\n", r"x\.jsonl:1: the row is a boolean; it must be an object .*"),
        (
            b'{"a": 1}\n{"a": "\xff"}\n',
            r"x\.jsonl:2: not valid UTF-8 \(byte 8 of the line\); save the file as UTF-8",
        ),
        (
            '{"a": 1}\r\n{"b": {"a": 1, "a": 2}}\r\n',
            r"x\.jsonl:2: the field 'a' is given twice; remove one",
        ),
        ("", r"x\.jsonl: no row in this file; it takes one object or more"),
        ("\n \n", r"x\.jsonl: no row in this file; it takes one object or more"),
    ],
    "x.json": [
        (
            '[\n{"a": 1},\n{"a": ]',
            r"x\.json:3: malformed JSON \(.*, column 7\); a \.json file holds one array .* \.jsonl",
        ),
        ('{"a": 1}\n{"a": 2}', r"x\.json:2: malformed JSON \(Extra data, .*\); .* is \.jsonl"),
        ('{"a": 1}', r"x\.json: holds an object, not an array; a \.json file holds one array .*"),
        ('[{"a": 1}, null]', r"x\.json row 2: the row is null; it must be an object .*"),
        ('[{"a": 1}, 3]', r"x\.json row 2: the row is a number; it must be an object .*"),
        (
            '[{"a": 1}, {"a": 2, "a": 2}]',
            r"x\.json row 2: the field 'a' is given twice; remove one",
        ),
        (b'[\n"\xff"]', r"x\.json:2: not valid UTF-8 \(byte 2 of the line\); save .*"),
        ("[]", r"x\.json: no row in this file; it takes one object or more"),
    ],
}
BAD_FILES = [(name, *case) for name, cases in BAD_FILES.items() for case in cases]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_fault_in_a_file_is_one_line_that_names_the_place_and_the_remedy(
    tmp_path, name, content, message
):
    fails(message, builders.load, write(tmp_path / name, content))
    zipped = message.replace("x\\.jsonl:", "x\\.jsonl\\.gz:").replace("x\\.json:", "x\\.json\\.gz:")
    zipped = zipped.replace("x\\.json row", "x\\.json\\.gz row")
    fails(zipped, builders.load, write(tmp_path / f"{name}.gz", content))


def test_lines_that_hold_no_row_are_dropped_and_counted_where_asked(tmp_path):
    content = (
        b'\xef\xbb\xbf{"prompt": "a"}\r\n{oops\r\n\r\n{"prompt": "\xff"}\n[1]\n{"prompt": "b"}\r\n'
    )
    path = write(tmp_path / "x.jsonl", content + b'{"prompt": "c", "prompt": "d"}')
    fails(r"x\.jsonl:2: malformed JSON .*", builders.load, path)
    rows = builders.load(path, on_bad_row="drop")
    examples = batches.prompts(rows, BYTES, 4, on_bad_row="drop")
    assert examples.where == ["x.jsonl:1", "x.jsonl:6"]
    assert examples.counts.dropped == {"faulty row": 4}
    assert examples.counts.first["faulty row"].startswith("x.jsonl:2: malformed JSON (")
    fails(r"x\.jsonl:2: malformed JSON .*", batches.prompts, rows, BYTES, 4)


def test_a_line_of_fifty_megabytes_is_read_and_dropped_by_its_length(tmp_path):
    huge = {"prompt": "q", "completion": "long " * 10_000_000}
    path = write(tmp_path / "x.jsonl", lines({"prompt": "q", "completion": "a"}, huge))
    examples = batches.demonstrations(builders.load(path), BYTES, 8, 8)
    assert examples.counts.dropped == {"response over its limit": 1}
    assert examples.counts.first == {"response over its limit": "x.jsonl:2"}


def test_damaged_gzip_files_are_named(tmp_path):
    rng = np.random.default_rng(0)
    many = lines(*({"a": rng.integers(10**9, size=9).tolist()} for _ in range(2000)))
    whole = gzip.compress(many.encode())
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    fails(
        r"x\.jsonl\.gz: the gzip data is damaged or cut off after line [1-9]\d* \(.*\); fetch .*",
        builders.load,
        path,
    )
    path.write_bytes(whole[:1000] + b"\0\0\0\0\0\0\0\0" + whole[1008:])
    fails(r"x\.jsonl\.gz: the gzip data is damaged .*; fetch or .*", builders.load, path)
    path.write_bytes(many.encode())
    fails(r"x\.jsonl\.gz: the gzip data is damaged .* after line 0 .*", builders.load, path)


def test_sources_that_are_not_there_or_of_another_kind_are_named(tmp_path, monkeypatch):
    missing = tmp_path / "prefs.jsonl"
    fails(f"{missing}: no such file or folder; check the path", builders.load, missing)
    fails("prefs.json.gz: no such file or folder; check .*", builders.load, "prefs.json.gz")
    fails(r"\./prefs: no such file or folder; check the path", builders.load, "./prefs")
    table = write(tmp_path / "prefs.csv", "a,b\n")
    kinds = r"\.jsonl, \.jsonl\.gz, \.json, \.json\.gz"
    fails(f"{table}: unknown kind of file; {kinds} are read", builders.load, table)
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset_info.json").write_text(json.dumps({"alpaca": {"file_name": "a.json"}}))
    fails(
        r".*other/dataset_info.json: not TFDS's; name a file of the folder, .*",
        builders.load,
        other,
    )
    fails(rf"{tmp_path}: not a prepared TFDS folder \(no .*\); name .*", builders.load, tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fails(
        r"no_such_set: neither a file, nor a folder, nor a TFDS dataset \(.* not found\.\); .*",
        builders.load,
        "no_such_set",
    )


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = write(tmp_path / "x.jsonl", lines({"a": 1}))
    has = r"it has \['train'\]"
    fails(rf".*: cannot read split 'test' \(.*\); {has}", builders.load, path, split="test")
    fails(rf".*: cannot read split 'train\[' \(.*\); {has}", builders.load, path, split="train[")
    fails(
        rf".*: cannot read split 'train\[:0\]' \(.*\); {has}",
        builders.load,
        path,
        split="train[:0]",
    )


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", lines({"a": 1}))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # root may read everything
    fails(r".*x\.jsonl: cannot be read \(Permission denied\); .*", builders.load, path)


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", lines({"a": 1}))
    occupied = write(tmp_path / "occupied", "")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(occupied / "cache"))
    fails(
        r".*occupied/cache: the cache folder cannot be written \(.*\); set RLHF_JAX_CACHE to .*",
        builders.load,
        path,
    )


def test_a_registered_dataset_that_is_not_prepared_says_how_to(tmp_path):
    fails(
        r"mnist: not prepared under .*; run tfds\.builder\('mnist', .*\)\.download_and_.*",
        builders.load,
        "mnist",
        cache=tmp_path,
    )


def test_importing_and_building_needs_no_tensorflow_and_prints_nothing(tmp_path):
    path = write(tmp_path / "x.jsonl", lines({"prompt": "a"}))
    code = (
        "import sys; from rlhf_jax.data import batches, builders, tokenizers; "
        "assert 'tensorflow_datasets' not in sys.modules and 'transformers' not in sys.modules; "
        f"rows = builders.load({str(path)!r}); "
        "examples = batches.prompts(rows, tokenizers.byte_tokenizer(), max_prompt=4); "
        "batches.Loader(examples, batch_size=1).batch(0); "
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_prepared_tfds_folder_and_a_tfds_name_load(real_data):
    folder = real_data / "tfds_c4_tiny"
    rows = builders.load(folder / "c4" / "en" / "3.0.1", split="validation")
    assert len(rows) == 200
    row, where = rows[6]
    assert isinstance(row["text"], str) and len(row["text"]) > 100
    assert where == "c4/en/3.0.1:validation row 7"
    named = builders.load("c4/en", split="train[:10]", cache=folder)
    assert len(named) == 10
    examples = batches.demonstrations(named, BYTES, max_prompt=1, max_response=20_000)
    assert examples.counts.rows == 10
    mapped = formats.renamed({"prompt": "text"})
    assert len(batches.prompts(named, BYTES, max_prompt=20_000, format=mapped)) == len(examples)


@pytest.mark.parametrize("kind", ["Sequence", "Dataset"])
def test_a_prepared_set_from_the_hub_is_read_by_its_name_and_without_the_hub(tmp_path, kind):
    """TFDS turns lists of messages inside out, or makes each a data source of its own."""
    import tensorflow_datasets as tfds

    said = [[("user", f"q{i}"), ("assistant", f"a{i}")][: 2 - i] for i in range(2)]
    said = [[{"role": role, "content": text} for role, text in turns] for turns in said]

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "org__set"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text, number = tfds.features.Text(), tfds.features.Scalar(np.float32)
            turns = getattr(tfds.features, kind)({"role": text, "content": text})
            fields = {
                "messages": turns,
                "scores": tfds.features.Sequence(number),
                "meta": {"tags": tfds.features.Sequence(text), "good": number},
            }
            features = tfds.features.FeaturesDict(fields)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, turns in enumerate(said):
                meta = {"tags": ["x", "y"][i:], "good": i}
                yield i, {"messages": turns, "scores": [0.5] * i, "meta": meta}

    Set(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    rows = builders.load("huggingface:Org__set", cache=tmp_path)
    for i, (row, where) in enumerate(rows):
        assert where == f"org__set/1.0.0:train row {i + 1}"
        meta = {"tags": ["x", "y"][i:], "good": i}
        assert row == {"messages": said[i], "scores": [0.5] * i, "meta": meta}
    assert formats.read(rows[0][0]).responses == ("a0",)
    with pytest.raises(ValueError, match=r"huggingface:org__no: not prepared under .*; run tfds"):
        builders.load("huggingface:org__no", cache=tmp_path)


# Rows to examples.


def test_each_schema_is_recognised_by_its_fields():
    row = {"prompt": "p", "completion": "c", "id": 7}
    assert formats.demonstration(row) == Example("p", ("c",), extra={"id": 7})
    assert formats.demonstration({"text": "t"}) == Example("", ("t",))
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert formats.comparison(pair) == Example("p", ("a", "b"), (0, 1))
    assert formats.comparison(pair | {"margin": 2}).margin == 2.0
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 1]}
    expected = Example("p", ("a", "b", "c"), (1, 0, 1))
    assert formats.comparison(ranked) == expected
    assert formats.prompt(pair) == Example("p", ("a", "b"), (0, 1))


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
BAD_ROWS = [
    (formats.comparison, {"prompt": "p", "chosen": "a"}, "'rejected' is missing; a comparison .*"),
    (formats.comparison, {"chosen": "a", "rejected": "b"}, "'prompt' is missing; a comparison .*"),
    (formats.comparison, PAIR | {"chosen": ["a"]}, r"'chosen' must be a string, got \['a'\]; .*"),
    (formats.comparison, PAIR | {"chosen": None}, "'chosen' must be a string, got None; a comp.*"),
    (formats.comparison, PAIR | {"rejected": ""}, "'rejected' is empty; fill it in or remove .*"),
    (formats.comparison, PAIR | {"margin": "1"}, "'margin' must be a finite number, got '1'; l.*"),
    (formats.comparison, PAIR | {"margin": True}, "'margin' must be a finite number, got True; .*"),
    (formats.comparison, PAIR | {"margin": float("nan")}, "'margin' must .*, got nan; leave it .*"),
    (formats.comparison, {"prompt": "p", "responses": ["a"]}, "'ranks' is missing; a compari.*"),
    (formats.comparison, {"prompt": "p", "ranks": [0]}, "'responses' is missing; a comparison .*"),
    (formats.comparison, RANKED | {"responses": "ab"}, "'responses' must be a list, got 'ab'; .*"),
    (formats.comparison, RANKED | {"ranks": 3}, "'ranks' must be a list, got 3; a comparison .*"),
    (formats.comparison, RANKED | {"ranks": [0]}, "2 'responses' but 1 'ranks'; give each .*"),
    (formats.comparison, RANKED | {"ranks": [0, 1.0]}, r"'ranks\[1\]' must be .*, got 1\.0; 0 .*"),
    (formats.comparison, RANKED | {"ranks": [-1, 0]}, r"'ranks\[0\]' must be .*, got -1; 0 is .*"),
    (formats.comparison, RANKED | {"ranks": [True, 0]}, r"'ranks\[0\]' must be .*, got True; 0.*"),
    (formats.comparison, RANKED | {"responses": ["a", 1]}, r"'responses\[1\]' must be a str.*; .*"),
    (formats.comparison, RANKED | {"responses": ["", "b"]}, r"'responses\[0\]' is empty; fill .*"),
    (formats.comparison, RANKED | {"chosen": "a"}, "'chosen' is given beside 'responses' and .*"),
    (
        formats.comparison,
        {"prompt": "p", "responses": ["a"], "ranks": [0]},
        "'responses' holds 1; it takes 2 or more; a comparison .*",
    ),
    (formats.demonstration, {"prompt": "p"}, "'completion' is missing; a demonstration has .*"),
    (formats.demonstration, {"output": "c"}, r"no known format has the fields \['output'\]; a .*"),
    (formats.demonstration, {"text": " \n"}, "'text' is empty; fill it in or remove the row; .*"),
    (formats.demonstration, {"text": 3}, "'text' must be a string, got 3; a demonstration .*"),
    (formats.demonstration, {"text": "t", "prompt": "p"}, "both 'text' and 'prompt' are given; .*"),
    (formats.demonstration, {"text": "\ud800"}, "'text' holds half a surrogate pair; write .*"),
    (
        formats.demonstration,
        {"text": ["long"] * 99},
        r"'text' must be a string, got \['long', .{0,60}\.\.\.; a demonstration .*",
    ),
    (formats.prompt, {"text": "p"}, "'prompt' is missing; a prompt row has 'prompt'"),
    (formats.prompt, {"prompt": {}}, r"'prompt' must be a string, got \{\}; a prompt row has .*"),
]


@pytest.mark.parametrize(("parse", "row", "message"), BAD_ROWS)
def test_a_fault_in_a_row_is_one_line_that_names_file_line_field_and_remedy(parse, row, message):
    def read():
        with at("prefs.jsonl:17"):
            parse(row)

    fails("prefs.jsonl:17: " + message, read)


def test_a_faulty_row_of_a_file_is_named_by_its_file_and_line(tmp_path):
    path = write(tmp_path / "prefs.jsonl", lines(PAIR, *[PAIR] * 15) + '{"prompt": "x"}\n')
    fails(
        r"prefs\.jsonl:17: 'chosen' is missing; .*",
        batches.comparisons,
        builders.load(path),
        BYTES,
        4,
        4,
    )
    fails(r"row 2: 'prompt' is missing; .*", batches.prompts, [PAIR, {}], BYTES, 4)


# Examples to counts.


def test_demonstrations_that_do_not_fit_or_repeat_are_dropped_and_counted():
    rows = [
        {"prompt": "abcd", "completion": "xyz"},  # 4 and 3 + EOS: just fits
        {"prompt": "abcde", "completion": "x"},
        {"prompt": "abcd", "completion": "wxyz"},
        {"prompt": "abcd", "completion": "xyz"},
        {"prompt": "abcde", "completion": "x"},  # a repeat counts once as what it is first
        {"text": "1234567"},  # 7 + EOS: just fits 4 + 4
        {"text": "12345678"},
    ]
    examples = batches.demonstrations(rows, BYTES, max_prompt=4, max_response=4)
    assert examples.counts.dropped == {
        "prompt over its limit": 1,
        "response over its limit": 1,
        "exact duplicate": 2,
        "text over its limit": 1,
    }
    assert examples.counts.first["exact duplicate"] == "row 4"
    assert (len(examples), examples.counts.kept, examples.counts.rows) == (2, 2, 7)
    assert examples.where == ["row 1", "row 6"]
    assert describe(examples.counts) == (
        "7 rows, 2 kept, 5 dropped: 2 exact duplicate (first: row 4), 1 prompt over its limit "
        "(first: row 2), 1 response over its limit (first: row 3), 1 text over its limit "
        "(first: row 7)"
    )


def test_comparisons_that_rank_nothing_are_dropped_and_counted():
    rows = [
        PAIR,
        PAIR | {"rejected": "a"},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "p", "responses": ["a", "a", "a"], "ranks": [0, 1, 2]},
        {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [0, 0, 1]},  # equal, and ranked so
        {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [0, 1, 2]},  # a above a
        PAIR | {"margin": 1.0},  # another example than the first
        PAIR,
        PAIR | {"prompt": "p" * 9},
        PAIR | {"rejected": "b" * 9},
    ]
    examples = batches.comparisons(rows, BYTES, max_prompt=8, max_response=8)
    assert examples.counts.dropped == {
        "chosen equals rejected": 3,
        "no two ranks differ": 1,
        "exact duplicate": 1,
        "prompt over its limit": 1,
        "response over its limit": 1,
    }
    assert examples.where == ["row 1", "row 5", "row 7"]


def test_nothing_dropped_is_said_too_and_nothing_left_is_an_error():
    examples = batches.prompts([{"prompt": "a"}, {"prompt": "b"}], BYTES, max_prompt=1)
    assert describe(examples.counts) == "2 rows, 2 kept, none dropped"
    fails(
        r"no usable row is left \(1 rows, 0 kept, 1 dropped: 1 prompt over its .*\); raise .*",
        batches.prompts,
        [{"prompt": "ab"}],
        BYTES,
        1,
    )
    fails(r"no usable row is left \(0 rows, .*\); raise .*", batches.prompts, [], BYTES, 1)
    fails(r"max_prompt=0 must be 1 or more tokens", batches.prompts, [], BYTES, 0)


# Examples to arrays.


@pytest.mark.parametrize("bos", [None, 5])
def test_a_demonstration_is_bos_prompt_completion_eos_and_padding_on_the_right(bos):
    examples = batches.demonstrations(
        [{"prompt": "ab", "completion": "xyz"}], with_bos(bos), max_prompt=4, max_response=5
    )
    start = [] if bos is None else [bos]
    ids = [*start, *b"abxyz", EOS]
    example = examples[0]
    assert example.tokens.tolist() == ids + [PAD] * (9 - len(ids))
    assert example.attend.tolist() == [1] * len(ids) + [0] * (9 - len(ids))
    trained = [0] * (len(start) + 2) + [1] * 4  # x, y, z and EOS
    assert example.mask.tolist() == trained + [0] * (9 - len(ids))
    assert [field.dtype for field in example] == [np.int32, np.int32, np.float32]


@pytest.mark.parametrize("bos", [None, 5])
def test_plain_text_is_trained_on_all_tokens_but_the_first(bos):
    examples = batches.demonstrations([{"text": "abc"}], with_bos(bos), 3, 3)
    ids = ([] if bos is None else [bos]) + [*b"abc", EOS]
    assert examples[0].tokens.tolist() == ids + [PAD] * (6 - len(ids))
    assert examples[0].mask.tolist() == [0] + [1] * (len(ids) - 1) + [0] * (6 - len(ids))


def test_comparisons_have_room_for_the_largest_k_and_absent_responses_are_all_zero():
    rows = [
        PAIR | {"margin": 0.5},
        {"prompt": "q", "responses": ["x", "yy", "z"], "ranks": [2, 0, 2]},
    ]
    examples = batches.comparisons(rows, with_bos(5), max_prompt=2, max_response=3)
    batch = Loader(examples, batch_size=2, shuffle=False).batch(0)
    assert batch.tokens.shape == (2, 3, 5)
    assert batch.tokens[0].tolist() == [[5, *b"pa", EOS, PAD], [5, *b"pb", EOS, PAD], [PAD] * 5]
    assert batch.tokens[1, 1].tolist() == [5, *b"qyy", EOS]
    assert batch.attend.sum(axis=2).tolist() == [[4, 4, 0], [4, 5, 4]]
    assert batch.ranks.tolist() == [[0, 1, 0], [2, 0, 2]]
    assert batch.present.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.mask[0].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0] * 5]  # answer and EOS
    assert batch.mask[1].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert batch.margin.tolist() == [0.5, 0]
    dtypes = [field.dtype for field in batch]
    assert dtypes == [np.int32, np.int32, np.float32, np.int32, *[np.float32] * 3]


def test_ranks_that_stand_in_for_scores_run_from_one_to_zero_wherever_they_start():
    def scores(*ranks):
        rows = [{"prompt": "p", "responses": [*"abcd"[: len(ranks)]], "ranks": [*ranks]}]
        return batches.comparisons(rows, BYTES, 2, 3)[0].scores.tolist()

    assert scores(1, 2) == scores(0, 1) == scores(5, 9) == [1, 0]
    assert scores(3, 1, 2) == [0, 1, 0.5]
    assert scores(2, 4, 4, 3) == [1, 0, 0, 0.5]
    assert rating([1, 1, 1]).tolist() == [1, 1, 1]


def silent_tokenizer(bos: int | None) -> Tokenizer:
    """Knows the word "a" alone, and has no token for anything else."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.normalizer = tokenizers.normalizers.Replace("b", "")
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(4, 1, (2,), bos, words, {})


def test_a_prompt_of_no_tokens_is_refused_by_name():
    rows = [{"prompt": "a", "completion": "a"}, {"prompt": "b", "completion": "a"}]
    message = "row 2: the prompt has no tokens; a response follows one token or more: .* BOS"
    silent = silent_tokenizer(None)
    fails(message, batches.prompts, rows, silent, 4)
    fails(message, batches.demonstrations, rows, silent, 4, 4)
    pairs = [{"prompt": p, "chosen": "a", "rejected": "a a"} for p in "ab"]
    fails(message, batches.comparisons, pairs, silent, 4, 4)
    kept = batches.prompts(rows, silent, 4, on_bad_row="drop")
    assert kept.counts.dropped == {"faulty row": 1}
    chats = [{"prompt": [{"role": "user", "content": p}]} for p in "ab"]
    bare = silent.with_template("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    fails(message, batches.prompts, chats, bare, 4)
    answered = [
        {"messages": row["prompt"] + [{"role": "assistant", "content": "a"}]} for row in chats
    ]
    fails(message, batches.demonstrations, answered, bare, 4, 4)
    assert len(batches.prompts(rows, silent_tokenizer(3), 4)) == 2  # BOS alone is enough
    sampled = [batches.Sampled([], [[7], [8]], [0, 1])]
    fails("sample 1 has a prompt of no tokens; .*", batches.sampled_comparisons, sampled, BYTES, 4)


def test_sampled_responses_become_comparisons_as_they_were_drawn():
    ended, cut, same = [7, EOS], [8, 9, 10], [[7], [7]]
    samples = [
        batches.Sampled(np.array([1, 2], np.int32), [np.array(ended, np.int32), cut], [1, 0]),
        batches.Sampled([3], same, [0, 1]),
        batches.Sampled([3], [[7], [8]], [1, 1]),
    ]
    examples = batches.sampled_comparisons(samples, BYTES, 6)
    assert examples.counts.dropped == {batches.SAME_RESPONSES: 1, batches.NO_PAIR: 1}
    (batch,) = Loader(examples, batch_size=1).epoch_batches()
    assert batch.tokens[0].tolist() == [[1, 2, 7, EOS, PAD, PAD], [1, 2, 8, 9, 10, PAD]]
    assert batch.attend[0].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch.mask[0].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert batch.ranks.tolist() == [[1, 0]] and batch.present.tolist() == [[1, 1]]
    fails("sample 1 has 5 tokens, .* length=4", batches.sampled_comparisons, samples, BYTES, 4)


def test_sampled_responses_keep_their_scores_ties_and_cuts():
    samples = [
        batches.Sampled([1, 2], [[7, EOS], [8, 9, 10]], [1, 0], [0.0, 1.0]),
        batches.Sampled([3], [[7], [7]], [0, 1], [0.5, 0.5]),
    ]
    examples = batches.sampled_scored(samples, BYTES, 6)
    assert len(examples) == 2 and not examples.counts.dropped
    batch = examples.gather(np.array([0, 1]))
    assert batch.tokens[0].tolist() == [[1, 2, 7, EOS, PAD, PAD], [1, 2, 8, 9, 10, PAD]]
    assert batch.mask[0].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert batch.scores.tolist() == [[0.0, 1.0], [0.5, 0.5]]
    assert len(examples.first(1)) == 1 and len(examples.first(None)) == 2
    assert examples.first(1)[0].scores.tolist() == [0.0, 1.0]


def test_prompts_are_padded_on_the_left_and_numbered():
    examples = batches.prompts([{"prompt": "ab"}, {"prompt": "c"}], with_bos(5), max_prompt=4)
    batch = Loader(examples, batch_size=2, shuffle=False).batch(0)
    assert batch.tokens.tolist() == [[PAD, 5, *b"ab"], [PAD, PAD, 5, *b"c"]]
    assert batch.attend.tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.index.tolist() == [0, 1]
    assert [field.dtype for field in batch[:3]] == [np.int32] * 3
    assert batch[3:] == (None, None, None)  # no references


def test_the_prompt_part_of_a_demonstration_is_what_the_sampler_is_fed(real_data):
    tokenizer = from_folder(real_data / "models/stories260K")
    rows = [{"prompt": "One day, Tom saw a d", "completion": "og. It was big."}]
    fed = batches.prompts(rows, tokenizer, max_prompt=32)[0]
    trained = batches.demonstrations(rows, tokenizer, max_prompt=32, max_response=32)[0]
    before = trained.tokens[(trained.attend > 0) & (trained.mask == 0)]
    assert before.tolist() == fed.tokens[fed.attend > 0].tolist()
    assert before[0] == 1 and trained.tokens[trained.mask > 0][-1] == 1  # BOS; this model's EOS
    text = tokenizer.decode(trained.tokens[trained.attend > 0])
    assert text == rows[0]["prompt"] + rows[0]["completion"]


# Batches.


def numbered(count: int) -> batches.Examples:
    """Prompts that are their own row number."""
    return batches.prompts([{"prompt": str(i)} for i in range(count)], BYTES, max_prompt=3)


def drawn(batch: batches.Prompts) -> list[int]:
    return [int(bytes(t[a > 0].astype(np.uint8))) for t, a in zip(batch.tokens, batch.attend)]


def order(loader: Loader, rows: int) -> list[int]:
    """The first `rows` rows of all batches, one after the other."""
    each = itertools.chain.from_iterable(drawn(loader.batch(i)) for i in itertools.count())
    return list(itertools.islice(each, rows))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_every_epoch_visits_every_row_once_and_each_in_another_order(batch_size):
    loader = Loader(numbered(20), batch_size, seed=3)
    stream = order(loader, 60)
    epochs = [stream[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(20))]}) == 4


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size():
    examples = numbered(20)
    first = order(Loader(examples, 4, seed=0), 60)
    assert order(Loader(examples, 5, seed=0), 60) == first
    other = order(Loader(examples, 4, seed=1), 60)
    epochs = {tuple(s[i : i + 20]) for s in (first, other) for i in (0, 20, 40)}
    assert len(epochs) == 6  # no epoch of one seed is an epoch of the next


def test_unshuffled_batches_repeat_the_order_of_the_dataset():
    assert order(Loader(numbered(5), 3, shuffle=False), 13) == [i % 5 for i in range(13)]


def test_resuming_in_mid_epoch_equals_an_uninterrupted_run():
    loader = Loader(numbered(10), 4, seed=1)
    whole = [drawn(batch) for batch in itertools.islice(loader.from_position(0), 9)]
    assert whole == [drawn(loader.batch(i)) for i in range(9)]
    resumed = Loader(numbered(10), 4, seed=1).from_position(6)
    assert [drawn(batch) for batch in itertools.islice(resumed, 3)] == whole[6:]


def test_a_process_that_leaves_its_batches_unread_still_ends(tmp_path):
    code = (
        "from rlhf_jax.data import batches, tokenizers; "
        "rows = [{'prompt': str(i)} for i in range(9)]; "
        "examples = batches.prompts(rows, tokenizers.byte_tokenizer(), max_prompt=4); "
        "batch = next(batches.Loader(examples, 2).from_position(3))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


def test_batches_are_prefetched_by_another_thread():
    threads = []
    examples = numbered(10)

    def collate(*arguments):
        threads.append(threading.get_ident())
        return examples.collate(*arguments)

    watched = dataclasses.replace(examples, collate=collate)
    next(Loader(watched, 2).from_position(0))
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_processes_read_their_places_of_the_same_global_batch(hosts):
    """A mesh may give a process places that are apart, and online stages read a place twice."""
    loader = Loader(numbered(10), 8, seed=2)
    order = np.array([5, 0, 1, 4, 6, 6, 7, 2])
    parts = [loader.reading(places) for places in np.split(order, hosts)]
    iterators = [part.from_position(1) for part in parts]
    for i in (1, 2, 3):
        whole = loader.batch(i)
        for read in ([part.batch(i) for part in parts], list(map(next, iterators))):
            jax.tree.map(
                lambda field, *pieces: np.testing.assert_array_equal(
                    np.concatenate(pieces), field[order]
                ),
                whole,
                *read,
            )


def test_a_prompt_drawn_twice_in_a_batch_has_two_numbers():
    loader = Loader(numbered(3), 8, seed=0)
    for i in range(4):
        batch = loader.batch(i)
        assert len(set(batch.index.tolist())) == 8
        assert (batch.index % 3).tolist() == drawn(batch)
    small = Loader(numbered(3), 3, seed=0).batch(5)
    assert small.index.tolist() == drawn(small)


def test_the_row_of_a_prompt_is_found_by_its_number_with_all_its_fields():
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "tags": [i]} for i in range(3)]
    examples = batches.prompts(rows, BYTES, max_prompt=8)
    batch = Loader(examples, 8, seed=0).batch(1)
    for tokens, attend, index in zip(batch.tokens, batch.attend, batch.index):
        source = examples.sources[index % len(examples)]
        assert bytes(tokens[attend > 0].astype(np.uint8)).decode() == source.prompt
        number = int(source.prompt[0])
        assert source.extra == {"answer": number + 1, "tags": [number]}


def test_prompts_that_differ_in_other_fields_alone_are_duplicates():
    rows = [{"prompt": "p", "completion": x, "id": i} for i, x in enumerate("ab")]
    examples = batches.prompts(rows, BYTES, max_prompt=8)
    assert examples.counts.dropped == {batches.DUPLICATE: 1}
    assert examples.sources == [Example("p", ("a",), extra={"id": 0})]
    same = [{"text": "t", "id": i} for i in range(2)]
    assert len(batches.demonstrations(same, BYTES, 4, 4)) == 1
    # A response that is far too long for any limit does not count against its prompt.
    assert len(batches.prompts([{"prompt": "p", "completion": "x" * 9999}], BYTES, 2)) == 1


def test_an_epoch_for_evaluation_is_every_row_once_in_order_in_one_shape():
    loader = Loader(numbered(10), 4, seed=0)
    epoch = loader.epoch_batches()
    assert len(epoch) == len(loader) == 3
    assert {batch.tokens.shape for batch in epoch} == {(4, 3)}
    assert [batches.real_rows(batch) for batch in epoch] == [4, 4, 2]
    assert np.concatenate([batch.index for batch in epoch]).tolist() == [*range(10), -1, -1]
    assert epoch[-1].attend[2:].sum() == 0 and (epoch[-1].tokens[2:] == PAD).all()
    halves = [loader.reading(x).epoch_batches()[-1] for x in (np.arange(2), np.arange(2, 4))]
    assert np.concatenate([half.index for half in halves]).tolist() == [8, 9, -1, -1]


def test_padding_rows_of_an_evaluation_carry_no_loss():
    demonstrations = batches.demonstrations([{"text": "abc"}], BYTES, 3, 3)
    (batch,) = Loader(demonstrations, 2).epoch_batches()
    assert batches.real_rows(batch) == 1
    assert batch.mask[1].sum() == batch.attend[1].sum() == 0
    (batch,) = Loader(batches.comparisons([PAIR], BYTES, 3, 3), 2).epoch_batches()
    assert batches.real_rows(batch) == 1
    assert batch.present.tolist() == [[1, 1], [0, 0]]
    assert batch.mask[0].any() and not batch.mask[1].any()


def test_tokens_that_are_not_padding_are_counted_in_every_kind_of_batch():
    told = batches.demonstrations(
        [{"prompt": "ab", "completion": "c"}, {"text": "abc"}], BYTES, 4, 4
    )
    asked = batches.prompts([{"prompt": "abc"}, {"prompt": "d"}], BYTES, 4)
    ranked = batches.comparisons([PAIR, RANKED | {"responses": ["aa", "b"]}], BYTES, 4, 4)
    for examples, count in (
        (told, 4 + 4),
        (mixing.pack(told), 4 + 4),
        (asked, 3 + 1),
        (ranked, 4 * len("p_") + 1 + 4),
    ):
        (batch,) = Loader(examples, 3).epoch_batches()  # with a row of padding at least
        assert batches.real_tokens(batch) == count


def test_a_loader_of_another_kind_than_is_trained_on_is_refused_in_the_callers_words():
    pairs = Loader(batches.comparisons([PAIR], BYTES, 4, 4), 1)
    batches.expect(pairs, "reward_model.run", Comparisons)
    batches.expect(pairs, "reward_model.centre", Demonstrations, Comparisons)
    fails(
        r"sft\.run takes demonstrations, but the loader draws Comparisons; build them with "
        r"batches\.demonstrations\(\.\.\.\)",
        batches.expect,
        pairs,
        "sft.run",
        Demonstrations,
    )
    fails(
        r"ppo\.run takes a Loader of prompts, got Examples; make one by batches\.Loader\(.*\)",
        batches.expect,
        numbered(2),
        "ppo.run",
        batches.Prompts,
    )


@pytest.mark.parametrize("rows", ["prompts.jsonl", pathlib.Path("prompts.jsonl")])
def test_a_path_in_place_of_rows_is_named_with_the_remedy(rows, no_shape_checks):
    message = (
        r"rows='prompts\.jsonl' is one text, not rows; open a file by builders\.load\(path\), .*"
    )
    fails(message, batches.prompts, rows, BYTES, 4)
    fails(message, mixing.split, rows, 0.5)


def test_rows_that_have_no_fields_are_named_with_the_remedy(no_shape_checks):
    message = r"row 2 is 'Once upon a time', not an object of fields; open .* or write rows as .*"
    rows = [{"text": "Once"}, "Once upon a time"]
    for on_bad_row in ("error", "drop"):  # the fault is the program's, not the file's
        fails(message, batches.demonstrations, rows, BYTES, 4, 4, on_bad_row=on_bad_row)
    fails("row 1 is 3, not an object .*", batches.prompts, [3], BYTES, 4)


def test_a_loader_that_can_draw_nothing_is_refused():
    empty = dataclasses.replace(numbered(2), rows=[])
    fails("there are no examples to draw batches from; check the dataset", Loader, empty, 1)
    fails("batch_size=0 must be 1 or more", Loader, numbered(2), 0)
    fails("seed=-1 must be 0 or more", Loader, numbered(2), 1, -1)
    loader = Loader(numbered(2), 3)
    fails("batch number -1 must be 0 or more", loader.batch, -1)
    fails("batch number -1 must be 0 or more", loader.from_position, -1)


# What people see before step 1.


def test_an_example_is_shown_with_the_part_that_is_trained_on():
    examples = batches.demonstrations([{"prompt": "ab ", "completion": "cd"}], with_bos(0x5E), 9, 9)
    assert show(examples[0], BYTES) == "^ab ⟦cd<eos>⟧"
    examples = batches.demonstrations([{"text": "abc"}], BYTES, 9, 9)
    assert show(examples[0], BYTES) == "a⟦bc<eos>⟧"
    assert show(batches.prompts([{"prompt": "ab"}], BYTES, 9)[0], BYTES) == "ab"


def test_a_comparison_is_shown_best_response_first():
    rows = [{"prompt": "p ", "responses": ["x", "y", "z"], "ranks": [1, 0, 1]}]
    rows.append({"prompt": "q ", "chosen": "a", "rejected": "b", "margin": 0.5})
    examples = batches.comparisons(rows, BYTES, 9, 9)
    assert show(examples[0], BYTES) == "rank 0: p y<eos>\nrank 1: p x<eos>\nrank 1: p z<eos>"
    assert show(examples[1], BYTES) == "margin 0.5\nrank 0: q a<eos>\nrank 1: q b<eos>"


def test_where_bos_is_an_eos_only_the_end_is_shown_as_one(real_data):
    tokenizer = from_folder(real_data / "models/stories260K")
    rows = [{"prompt": "One day.", "completion": " Tom ran."}]
    examples = batches.demonstrations(rows, tokenizer, max_prompt=9, max_response=9)
    assert show(examples[0], tokenizer) == "One day.⟦ Tom ran.<eos>⟧"


def test_real_stories_survive_the_way_from_file_to_batch(real_data):
    rows = builders.load(real_data / "stories/tinystories_sample.jsonl.gz")
    tokenizer = from_folder(real_data / "models/stories260K")
    examples = batches.demonstrations(rows, tokenizer, max_prompt=128, max_response=384)
    assert examples.counts.rows == len(rows) == 1840
    long = sum(len(tokenizer.encode(row["text"])) > 510 for row, _ in rows)
    assert examples.counts.dropped.get("text over its limit", 0) == long
    batch = Loader(examples, batch_size=8).batch(0)
    texts = {row["text"] for row, _ in rows}
    for tokens, attend in zip(batch.tokens, batch.attend):
        assert tokenizer.decode(tokens[attend > 0]) in texts
