"""Files of a run on a disk, and in a bucket: a place that cannot rename, append or make folders."""

import io
import json
import pathlib

import pytest
import tiny
from etils.epath import backend, gpath

from rlhf_jax import folders, storage
from rlhf_jax.config import Config
from rlhf_jax.data import builders
from rlhf_jax.launch import launch
from rlhf_jax.models.huggingface import files
from rlhf_jax.training.metrics import Display


class Bucket(backend.Backend):
    """Objects by name, in memory, as a cloud holds them; what a cloud lacks is missing here."""

    def __init__(self):
        self.objects = {}

    def names(self, folder):
        start = str(folder).rstrip("/") + "/"
        return [name.removeprefix(start) for name in self.objects if name.startswith(start)]

    def open(self, path, mode):
        path = str(path)
        if mode in ("r", "rb"):
            if path not in self.objects:
                raise FileNotFoundError(2, "no such object", path)
            raw = io.BytesIO(self.objects[path])
        else:
            assert mode in ("w", "wb"), f"an object cannot be opened with mode {mode!r}"
            raw = _Upload(self.objects, path)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    def exists(self, path):
        return str(path) in self.objects or bool(self.names(path))

    def isdir(self, path):
        return bool(self.names(path))

    def listdir(self, path):
        return sorted({name.split("/")[0] for name in self.names(path)})

    def glob(self, path):
        folder, _, pattern = str(path).rpartition("/")
        found = (name for name in self.names(folder) if pathlib.PurePath(name).match(pattern))
        return [f"{folder}/{name}" for name in found]

    def makedirs(self, path, *, exist_ok=False, mode=None):
        pass  # names have slashes in them, that is all

    mkdir = makedirs

    def rmtree(self, path):
        if not self.exists(path):
            raise FileNotFoundError(2, "no such object", str(path))
        for name in self.names(path):
            del self.objects[f"{path}/{name}"]

    def remove(self, path):
        if str(path) not in self.objects:
            raise FileNotFoundError(2, "no such object", str(path))
        del self.objects[str(path)]

    def _missing(self, *arguments, **options):
        raise NotImplementedError("a bucket has no such operation")

    rename = replace = copy = stat = walk = _missing


class _Upload(io.BytesIO):
    """An object appears when its upload is closed, as a whole."""

    def __init__(self, objects, name):
        super().__init__()
        self._objects, self._name = objects, name

    def close(self):
        if not self.closed:
            self._objects[self._name] = self.getvalue()
        super().close()


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", made)
    return made


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, bucket):
    """A folder on a disk, and one in a bucket."""
    if request.param == "bucket":
        return storage.path("gs://b/folder")
    (tmp_path / "folder").mkdir()
    return storage.path(tmp_path / "folder")


def test_a_path_with_a_scheme_is_in_a_bucket_and_keeps_its_name():
    for name, inside in (("gs://b/x", True), ("/a/b", False), ("a/b", False), ("gs:/b", False)):
        assert storage.in_bucket(storage.path(name)) == storage.in_bucket(name) == inside
        assert str(storage.path(name)) == name
    assert str(storage.path("gs://b/x") / "y") == "gs://b/x/y"
    assert str(storage.absolute("gs://b/x")) == "gs://b/x"
    assert storage.absolute("x") == pathlib.Path.cwd() / "x"


def test_a_file_is_written_over_and_nothing_else_is_left(place):
    file = place / "summary.json"
    storage.write(file, "old, and longer")
    storage.write(file, b"new")
    assert file.read_text() == "new" and [x.name for x in place.iterdir()] == ["summary.json"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    storage.write(tmp_path / "summary.json", "old")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        storage.write(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


def test_lines_are_added_to_those_that_are_there(place):
    for part in (["a\n", "b\n"], ["c\n"], []):
        with storage.Lines(place / "metrics.jsonl") as lines:
            for line in part:
                lines.write(line)
    assert (place / "metrics.jsonl").read_text() == "a\nb\nc\n"


def test_lines_on_a_disk_are_there_at_once_and_in_a_bucket_after_a_while(tmp_path, bucket):
    with storage.Lines(tmp_path / "lines") as lines:
        lines.write("a\n")
        assert (tmp_path / "lines").read_text() == "a\n"
    file = storage.path("gs://b/lines")
    lines = storage.Lines(file)
    lines.write("a\n")
    assert not file.exists()
    lines._when -= storage.REWRITE_SECONDS
    lines.write("b\n")
    assert file.read_text() == "a\nb\n"
    lines.write("c\n")
    assert file.read_text() == "a\nb\n"
    lines.close()
    assert file.read_text() == "a\nb\nc\n"


def test_a_folder_is_removed_with_all_that_is_in_it(place):
    storage.write(place / "a", "a")
    (place / "deep").mkdir()
    storage.write(place / "deep" / "b", "b")
    storage.remove(place)
    storage.remove(place)
    assert not place.exists()


# -------------------------------------------------------------------------------- whole workdirs


class Toy(Config):
    """An experiment of two settings."""

    rate: float = 0.1
    num_iterations: int = 2


def run(config, context):
    """Writes what a run writes: metrics, samples, files of its own."""
    display = Display("Toy", ("loss",), {})
    with context.log.stage("toy", config.num_iterations, display=display) as stage:
        for step in range(config.num_iterations):
            stage.write(step, {"loss": 1.0 / (step + 1)})
    context.log.samples("toy", 0, [{"prompt": "p", "completion": "c"}])
    storage.write(context.workdir / "rows.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')
    rows = [row["prompt"] for row, _ in builders.load(context.workdir / "rows.jsonl")]
    tiny.TOKENIZER.save(context.workdir / "tokenizer")
    return {"rows": len(rows)}


def test_a_run_in_a_bucket_is_the_run_on_a_disk(place, monkeypatch, tmp_path, capsys):
    """New, finished, longer, refused: as on a disk, and with the same files."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    flags = ["--workdir", str(place)]
    assert launch(run, Toy(), flags) == {"rows": 2}
    assert launch(run, Toy(), flags) == {"rows": 2}
    assert "is finished" in capsys.readouterr().out
    assert launch(run, Toy(num_iterations=3), flags) == {"rows": 2}
    lines = (place / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    with pytest.raises(SystemExit) as exit:
        launch(run, Toy(rate=0.5), flags)
    assert exit.value.code == 2 and "rate=0.1 -> rate=0.5" in capsys.readouterr().err
    names = {x.name for x in place.iterdir()} - {"tensorboard"}  # which is for disks alone
    written = "config.json summary.json metrics.jsonl samples.jsonl stages.json report.html"
    assert names == {*written.split(), "rows.jsonl", "tokenizer"}


def test_a_run_that_fails_before_its_first_step_leaves_no_trace_in_a_bucket(bucket):
    def fail(config, context):
        raise ValueError("a misspelt name")

    with pytest.raises(SystemExit):
        launch(fail, Toy(), ["--workdir", "gs://b/run"])
    assert not bucket.objects


def test_an_export_in_a_bucket_has_the_bytes_of_one_on_a_disk(bucket, tmp_path):
    model, places = tiny.model(), (tmp_path / "export", storage.path("gs://b/export"))
    for place in places:
        folders.export(place, model, tiny.TOKENIZER)
    found, expected = ({x.name: x.read_bytes() for x in place.iterdir()} for place in places)
    assert found == expected
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found.keys()


def test_an_export_that_breaks_off_leaves_nothing_that_is_taken_for_a_model(place, monkeypatch):
    folders.export(place / "export", tiny.model(), tiny.TOKENIZER)

    def fail(file, tensors):
        raise OSError(28, "no space left")

    with monkeypatch.context() as broken:
        broken.setattr(files, "write_tensors", fail)
        with pytest.raises(OSError, match="no space"):
            folders.export(place / "export", tiny.model(seed=1), tiny.TOKENIZER)
    assert "config.json" not in {x.name for x in (place / "export").iterdir()}
    folders.export(place / "export", tiny.model(seed=1), tiny.TOKENIZER)
    assert (place / "export" / "config.json").exists()
