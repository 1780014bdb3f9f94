"""Files that are not what they should be: each is refused in one line, soon, in little memory."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_huggingface import FIELDS, FOUR, random_tensors, write

from rlhf_jax import launch
from rlhf_jax.data import batches, builders, chat, formats, templates
from rlhf_jax.data.schema import BadRow, Message
from rlhf_jax.data.tokenizers import byte_tokenizer, from_folder
from rlhf_jax.models import huggingface, lora
from rlhf_jax.models.huggingface import configurations
from rlhf_jax.tasks import own_data as task
from rlhf_jax.tools import label, respond

pytestmark = pytest.mark.usefixtures("caches", "never_hangs")
TALK = (Message("user", "Hello?"),)


@pytest.fixture
def never_hangs():
    """A test that waits for ever fails after a minute."""

    def give_up(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def refused(*parts, error=ValueError):
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500, message
    for part in parts:
        assert str(part) in message, message


# --- through the command line ---------------------------------------------------------------------


@pytest.fixture
def says(experiment, tmp_path, capsys, real_data):
    """`says(**named)` runs own_data, which must refuse: its line, exit code 2, nothing left."""

    def says(**named):
        config = experiment("own_data").config
        given = {"model": real_data / "models" / "stories260K"} | named
        flags = [x for name, value in given.items() for x in (f"--{name}", str(value))]
        with pytest.raises(SystemExit) as stopped:
            launch.launch(task.run, config, [*flags, "--workdir", str(tmp_path / "run")])
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "has no pad" not in x]
        assert stopped.value.code == 2 and not (tmp_path / "run").exists()
        assert line.startswith("error: ")
        return line

    return says


def test_what_is_no_file_is_refused_by_an_experiment_in_one_line(says, tmp_path, real_data):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    assert f"{pipe}: a pipe or a device, not a file" in says(demonstrations=pipe)
    assert "/dev/zero: a pipe or a device" in says(demonstrations="/dev/zero")
    long = tmp_path / ("x" * 300 + ".jsonl")
    assert "File name too long" in says(demonstrations=long)
    folder = tmp_path / "model"
    shutil.copytree(real_data / "models" / "stories260K", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "config.json: cannot be read (Is a directory)" in says(model=folder, preferences="x")


def test_the_tools_refuse_a_pipe_and_half_a_surrogate_pair(tmp_path, capsys):
    pipe, half = tmp_path / "pipe.jsonl", tmp_path / "half.jsonl"
    os.mkfifo(pipe)
    half.write_text('{"prompt": "\\ud800", "responses": ["a", "b"]}\n')
    for file, what in (
        (pipe, "a pipe or a device"),
        (half, "half.jsonl:1: a text holds half a surro"),
    ):
        with pytest.raises(SystemExit) as stopped:
            label.main([str(file), "--output", str(tmp_path / "page.html")])
        assert stopped.value.code == 2 and what in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


# --- files of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz"])
def test_a_pipe_or_a_device_as_data_is_refused_unopened(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with refused(name, "a pipe or a device, not a file; write what it holds into a file"):
        builders.load(tmp_path / name)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with refused("zero.jsonl: a pipe or a device"):
        builders.load(tmp_path / "zero.jsonl")


def bomb(file, before, after, megabytes=48):
    """A .gz of one line that holds that many megabytes of the letter a."""
    with gzip.open(file, "wb", compresslevel=1) as opened:
        opened.write(before)
        for _ in range(megabytes):
            opened.write(b"a" * 2**20)
        opened.write(after)
    return file


def test_a_line_that_expands_to_more_than_its_limit_takes_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "MAX_LINE", 2**20)
    monkeypatch.setattr(builders, "MAX_ARRAY", 2**20)
    row = {"prompt": "p", "completion": "c"}
    file = bomb(tmp_path / "rows.jsonl.gz", b'{"prompt": "', f'"}}\n{json.dumps(row)}\n'.encode())
    array = bomb(tmp_path / "rows.json.gz", b'[{"prompt": "', b'"}]\n')
    tracemalloc.start()
    try:
        with refused("rows.jsonl.gz:1: the line has more than 1,048,576 bytes, the limit"):
            list(builders._rows_of(file, "error"))
        with refused("rows.json.gz: the file holds more than 1,048,576 bytes", "write one object"):
            list(builders._rows_of(array, "error"))
        # The next line is found behind it.
        first, second = builders._rows_of(file, "drop")
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()
    assert "more than 1,048,576 bytes" in first.row and first.number == 1
    assert second == (row, 2)


def test_a_line_of_just_the_limit_is_read(tmp_path, monkeypatch):
    row = json.dumps({"prompt": "p" * 50}) + "\n"
    monkeypatch.setattr(builders, "MAX_LINE", len(row))
    (tmp_path / "rows.jsonl").write_text(row * 2)
    assert len(list(builders._rows_of(tmp_path / "rows.jsonl", "error"))) == 2
    monkeypatch.setattr(builders, "MAX_LINE", len(row) - 1)
    with refused("rows.jsonl:1: the line has more than"):
        list(builders._rows_of(tmp_path / "rows.jsonl", "error"))


def test_a_file_of_blank_lines_ends_before_it_has_been_read(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "MAX_BLANK", 1000)
    row = b'{"prompt": "a"}\n'
    (tmp_path / "rows.jsonl").write_bytes(row + b"\n" * 1000 + row + b" \n" * 1000 + row)
    assert len(list(builders._rows_of(tmp_path / "rows.jsonl", "error"))) == 3
    (tmp_path / "rows.jsonl").write_bytes(row + b"\n" * 1001 + row)
    with refused("rows.jsonl:1002: more than 1,000 blank lines in a row"):
        list(builders._rows_of(tmp_path / "rows.jsonl", "drop"))


def test_nul_is_a_character_and_half_a_surrogate_pair_is_none():
    rows = [{"prompt": "a\0b", "completion": "c\0"}]
    (document,) = batches.demonstrations(rows, byte_tokenizer(), 8, 8).rows[0].documents
    assert document.ids.tolist() == [*b"a\0b", *b"c\0", 257]
    with refused("'prompt' holds half a surrogate pair"):
        batches.demonstrations([{"prompt": "\ud800", "completion": "c"}], byte_tokenizer(), 8, 8)
    with refused("surrogates not allowed"):
        byte_tokenizer().encode("\ud800")


# --- chat templates -------------------------------------------------------------------------------

ANSWER = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" * 9
UNFIT = {
    "loops for ever": (LOOP + ANSWER, "did not end within 0.3 s of processor time"),
    "is exponential": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "did not end within 0.3 s",
    ),
    "squares for ever": (
        "{% set x = namespace(n=3) %}{% for i in range(60) %}{% set x.n = x.n * x.n %}{% endfor %}",
        "did not end within 0.3 s",
    ),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses without end"),
    "makes gigabytes at once": ("{{ 'a' * 3000000000 }}", "needs more than 1,073,741,824 bytes"),
    "makes gigabytes by a width": ("{{ '%3000000000d' % 1 }}", "needs more than 1,073,741,824"),
    "makes gigabytes by doubling": (
        "{% set x = namespace(s='a') %}{% for i in range(40) %}{% set x.s = x.s ~ x.s %}"
        "{% endfor %}{{ x.s }}",
        "needs more than 1,073,741,824 bytes",
    ),
    "is nested too deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deep"),
    "is no template": ("{% for %}", "is no jinja template"),
}
REFUSED = {
    "divides by zero": ("{{ 1 // 0 }}", "by zero"),
    "asks for too long a range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "renders nothing": ("{# nothing #}", "it writes nothing for them"),
    "renders white space": (" \n ", "it writes nothing for them"),
    "renders too much": ("{{ 'a' * 10000001 }}", "10,000,001 characters, of which 10,000,000"),
    "writes half a surrogate pair": ("\ud800" + ANSWER, "half a surrogate pair"),
    "looks where nothing is": ("{{ messages[5].x.y }}", "no element 5"),
    "cannot format": ("{{ '%s %s' % 1 }}", "not enough arguments"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_template_that_is_unfit_ends_the_run_whatever_becomes_of_bad_rows(name, monkeypatch):
    template, what = UNFIT[name]
    if "0.3 s" in what:
        monkeypatch.setattr(templates, "SECONDS", 0.3)
    with refused("the chat template", what, "correct it or use another"):
        chat.render(byte_tokenizer().with_template(template), TALK)
    with pytest.raises(ValueError) as caught:
        rows = [{"messages": [{"role": "user", "content": "a"}]}]
        batches.prompts(rows, byte_tokenizer().with_template(template), 8, on_bad_row="drop")
    assert what in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_refuses_the_messages_makes_a_faulty_row(name):
    template, what = REFUSED[name]
    with refused("the chat template refuses the messages", what, error=BadRow):
        chat.render(byte_tokenizer().with_template(template), TALK)


def test_after_a_template_that_was_ended_the_next_is_rendered_in_any_thread(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with refused("did not end"):
        templates.render(LOOP, {"messages": []})
    from concurrent.futures import ThreadPoolExecutor

    def text(i):
        return templates.render("{{ i * n }}", {"i": str(i), "n": 3})

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, range(200))) == [str(i) * 3 for i in range(200)]


@pytest.mark.filterwarnings("ignore:os.fork")  # of jax, whose threads the child does not use
def test_a_fork_does_not_read_the_answers_of_its_parent():
    assert templates.render("{{ i }}", {"i": "parent"}) == "parent"
    child = os.fork()
    if not child:
        os._exit(0 if templates.render("{{ i }}", {"i": "child"}) == "child" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert templates.render("{{ i }}", {"i": "parent"}) == "parent"


# --- JSON files of a folder -----------------------------------------------------------------------


def tokenizer_folder(folder, **files):
    """The byte tokenizer with an EOS of 257; `files` are other contents by the stem of the name."""
    folder.mkdir(exist_ok=True)
    byte_tokenizer().save(folder)
    for name, content in files.items():
        file = folder / f"{name}.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


NESTED = b'{"a": ' * 200_000 + b"1" + b"}" * 200_000


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (NESTED, "brackets are nested too deep"),
        (b"[" * 200_000, "brackets are nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "unusable JSON (Exceeds the limit"),
        (b'"text"', "must hold a JSON object, not a str"),
        (b"", ":1: not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_a_json_file_that_cannot_be_used_is_named(name, content, what, tmp_path):
    with refused(f"{name}.json", what, "restore the file"):
        from_folder(tokenizer_folder(tmp_path, **{name: content}))


def test_a_byte_order_mark_is_passed_over_in_every_json_file(tmp_path):
    folder = tokenizer_folder(
        write(tmp_path / "m", FIELDS | FOUR | {"vocab_size": 16, "bos_token_id": 3}),
        special_tokens_map={"unk_token": "a"},
    )
    plain, model = from_folder(folder), huggingface.load(folder)
    files = sorted(folder.glob("*.json"))
    assert len(files) == 5
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = from_folder(folder)
    assert marked == plain and marked.settings == plain.settings
    assert huggingface.load(folder).config == model.config
    (tmp_path / "dataset_info.json").write_bytes(
        b"\xef\xbb\xbf" + b'{"a": {"file_name": "x.json"}}'
    )
    assert formats.dataset_info(tmp_path / "dataset_info.json", "a")[0] == tmp_path / "x.json"


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize(
    "eos", [-1, True, "</s>", 258, 2.0, ["</s>"], [-1], [257, True], [257, 10**30], {"a": 1}, [[1]]]
)
def test_an_eos_that_is_no_id_of_the_tokenizer_is_refused(name, eos, tmp_path):
    files = {"generation_config": {}} | {name: {"eos_token_id": eos}}
    with refused("eos_token_id=", "an id or a list of ids, each from 0 to the tokenizer's last"):
        from_folder(tokenizer_folder(tmp_path, **files))


@pytest.mark.parametrize("pad", [True, "x", 1.5, [0]])
def test_a_pad_that_is_no_id_is_refused(pad, tmp_path):
    with refused(f"pad_token_id={pad!r} must be an id or null"):
        from_folder(
            tokenizer_folder(tmp_path, generation_config={"eos_token_id": 1, "pad_token_id": pad})
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": 5},
        {"bos_token": {"a": 1}},
        {"add_bos_token": "yes"},
        {"chat_template": 7},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": {"default": None}},
    ],
)
def test_settings_of_a_tokenizer_of_another_kind_are_named(settings, tmp_path):
    with refused(f"{next(iter(settings))}=", "of tokenizer_config.json must be"):
        from_folder(tokenizer_folder(tmp_path, tokenizer_config=settings))


def test_an_id_of_any_size_is_no_reason_to_wait(tmp_path):
    folder = tokenizer_folder(tmp_path, tokenizer_config={}, generation_config={"eos_token_id": 1})
    broken = json.loads((folder / "tokenizer.json").read_text())
    broken["model"]["vocab"]["zz"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(broken))
    assert from_folder(folder).vocab_size == 2**31 + 1


@pytest.mark.parametrize("content", [b"{broken", b"{}", b"[]", b"\xff\xfe\x00"])
def test_a_broken_tokenizer_is_named(content, tmp_path):
    with refused("tokenizer.json: not a tokenizer", "restore the file"):
        from_folder(tokenizer_folder(tmp_path, tokenizer=content))


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", [None, "2x2x2"])
def test_weights_that_are_not_finite_are_refused_by_name(value, mesh, tmp_path):
    import tiny

    name = "model.layers.0.mlp.up_proj.weight"
    tensors = random_tensors()
    tensors[name].flat[-1] = value
    folder = write(tmp_path / "m", tensors=tensors)
    with refused("model.safetensors", name, "holds NaN or infinity"):
        huggingface.load(folder, mesh and tiny.mesh(mesh))


def test_a_number_that_overflows_in_the_type_it_is_kept_in_is_refused(tmp_path):
    tensors = random_tensors()
    tensors["model.norm.weight"][0] = 3.4e38
    folder = write(tmp_path / "m", tensors=tensors)
    huggingface.load(folder)
    with refused("model.norm.weight holds NaN or infinity as bfloat16"):
        huggingface.load(folder, store="bfloat16")


def test_an_adapter_that_is_not_finite_is_refused_by_name(tmp_path):
    import jax

    base = write(tmp_path / "base")
    adapted = lora.attach(huggingface.load(base), lora.Config(rank=2), jax.random.key(0))
    huggingface.save_adapter(tmp_path / "adapter", adapted, like=base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].flat[0] = np.nan
    save_file(tensors, file)
    with refused(f"tensor {name} holds NaN"):
        huggingface.load_adapter(tmp_path / "adapter", huggingface.load(base), like=base)


def header(file, change):
    """Changes the header of a safetensors file."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + size])
    text = json.dumps(change(fields)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize(
    "lie",
    [
        {"data_offsets": [0, 10**12]},
        {"data_offsets": [-4, 12]},
        {"shape": [10**9, 10**9]},
        {"shape": [-1]},
        {"dtype": "F99"},
    ],
)
def test_a_header_that_lies_about_its_tensors_is_refused(lie, tmp_path):
    folder = write(tmp_path / "m")
    header(
        folder / "model.safetensors",
        lambda fields: fields | {"model.norm.weight": fields["model.norm.weight"] | lie},
    )
    with refused("model.safetensors: damaged or not a safetensors file", "fetch it again"):
        huggingface.load(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with refused("damaged or not a safetensors file"):
        huggingface.load(folder)


def test_a_pipe_in_place_of_weights_is_refused_unopened(tmp_path):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with refused("model.safetensors: a pipe or a device"):
        huggingface.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("make, said", [(os.mkfifo, "a pipe or a device"), (os.mkdir, "a folder")])
def test_a_pipe_or_a_folder_in_place_of_a_tokenizers_file_is_refused(tmp_path, name, make, said):
    byte_tokenizer().save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with refused(f"{name}: {said}"):
        from_folder(tmp_path)


# --- mixtures of experts --------------------------------------------------------------------------

MIXTURES = [
    {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
    {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128},
    {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
    {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 32},
    {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 64},
    {"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"},
    {"architectures": ["NewForCausalLM"], "model_type": "new", "n_routed_experts": 64},
    {"num_experts": 8},
    {"num_local_experts": 8},
    {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {"num_local_experts": 16},
    },
    {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {"model_type": "qwen2", "num_experts": 4},
    },
]


@pytest.mark.parametrize("fields", MIXTURES)
def test_every_mixture_of_experts_is_refused_as_one(fields):
    with refused("config.json", "a mixture of experts, none of which is built"):
        configurations.config_from(FIELDS | FOUR | fields)


def test_a_model_that_says_it_has_no_experts_is_read():
    none = {"num_local_experts": 0, "num_experts": None}
    assert configurations.config_from(FIELDS | FOUR | none).num_layers == 1


def test_respond_is_refused_before_it_samples(tmp_path, capsys, real_data):
    (tmp_path / "half.jsonl").write_text('{"prompt": "x", "group": "\\udfff"}\n')
    model, output = str(real_data / "models" / "stories260K"), tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit) as stopped:
        respond.main([str(tmp_path / "half.jsonl"), "--model", model, "--output", str(output)])
    assert stopped.value.code == 2 and not output.exists()
    assert "half.jsonl:1: a text holds half a surrogate pair" in capsys.readouterr().err
