"""What comes from elsewhere is data: none of it is run, and it opens no file and no port."""

import ast
import io
import json
import pickle
import shutil
import socket
import sys

import numpy as np
import pytest
from test_huggingface import FIELDS, FOUR, random_tensors, refused, write
from test_layout import FILES, dotted, tree

from rlhf_jax.data import batches, builders, chat, embeddings, formats
from rlhf_jax.data.schema import BadRow, Message
from rlhf_jax.data.tokenizers import byte_tokenizer, from_folder
from rlhf_jax.models import huggingface
from rlhf_jax.tools import label, pages

pytestmark = pytest.mark.usefixtures("caches")


class Touch:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trap(tmp_path):
    """A path at which no file may be when the test ends."""
    yield tmp_path / "sprung"
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_would_be_run_where_it_is_read(tmp_path):
    """The trap works."""
    pickle.loads(pickle.dumps(Touch(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt"])
def test_pickled_weights_are_refused_unread(name, trap, tmp_path):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(trap)))
    with refused(name, "pickled weights are not read", "save_pretrained"):
        huggingface.load(folder)
    # Neither under another name, nor where an index names it.
    shutil.copyfile(folder / name, folder / "model.safetensors")
    with refused("model.safetensors: damaged or not a safetensors file"):
        huggingface.load(folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(random_tensors(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(name, "pickled weights are not read"):
        huggingface.load(folder)


def test_a_pickle_in_an_array_of_numpy_is_refused_unread(trap, tmp_path):
    np.save(tmp_path / "table.npy", np.array([Touch(trap)], dtype=object), allow_pickle=True)
    with refused("table.npy: not an array of numpy", "allow_pickle=False"):
        embeddings.from_array(tmp_path / "table.npy", byte_tokenizer())


def test_no_module_reads_pickles_runs_texts_or_trusts_code():
    """`eval` and `exec` as builtins, pickle in any dress, and settings that switch code on."""
    modules = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch", "runpy"}

    def imported(node):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return {name.split(".")[0] for name in names}

    def at_fault(node):
        if isinstance(node, ast.Import | ast.ImportFrom):
            return imported(node) & modules
        if isinstance(node, ast.Call) and dotted(node.func) in ("eval", "exec", "os.system"):
            return True
        if isinstance(node, ast.keyword):
            given = node.value.value if isinstance(node.value, ast.Constant) else None
            if node.arg in ("allow_pickle", "trust_remote_code"):
                return given is not False
            return node.arg == "shell"
        return False

    assert not [
        f"{name}:{node.lineno}" for name in FILES for node in ast.walk(tree(name)) if at_fault(node)
    ]
    said = {k.arg for x in FILES for k in ast.walk(tree(x)) if isinstance(k, ast.keyword)}
    assert {"allow_pickle", "trust_remote_code"} <= said  # the search finds where they are said


ATTACKS = {
    "'' .__class__.__mro__[1].__subclasses__()": "unsafe",
    "messages.append(1)": "unsafe",
    "messages.__init__.__globals__": "unsafe",
    "cycler.__init__.__globals__.os.popen('touch TRAP').read()": "unsafe",
    "raise_exception.__globals__['__builtins__']['open']('TRAP', 'w')": "unsafe",
    "strftime_now.__code__": "it writes nothing",
    "'{0.__class__}'.format('')": "it writes nothing",
    "open('TRAP', 'w')": "'open' is undefined",
    "self.__init__.__globals__": "unsafe",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_chat_template_stays_in_its_sandbox(attack, trap):
    template = "{{ " + attack.replace("TRAP", str(trap)) + " }}"
    with refused("the chat template refuses the messages", ATTACKS[attack]):
        chat.render(byte_tokenizer().with_template(template), [Message("user", "a")])


@pytest.mark.parametrize("statement", ["include", "import", "extends"])
def test_a_chat_template_opens_no_file(statement, tmp_path):
    (tmp_path / "secret.txt").write_text("a secret")
    named = f"'{tmp_path / 'secret.txt'}'" + (" as x" if statement == "import" else "")
    with pytest.raises(BadRow, match="no loader for this environment"):
        template = "{% " + f"{statement} {named}" + " %}"
        chat.render(byte_tokenizer().with_template(template), [Message("user", "a")])


def test_what_a_user_writes_is_no_template():
    text = "{{ 7 * 7 }}{% raw %}"
    assert text in chat.render(
        byte_tokenizer().with_template("{{ messages[0].content }}"), [Message("user", text)]
    )


def test_code_in_a_models_folder_is_never_run(trap, tmp_path, monkeypatch):
    folder = write(tmp_path / "m")
    byte_tokenizer().save(folder)
    (folder / "evil.py").write_text(
        f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    remote = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(FIELDS | FOUR | {"auto_map": remote}))
    huggingface.load(folder)  # by what it says of a Llama
    from_folder(folder)
    other = {"architectures": ["EvilForCausalLM"], "auto_map": remote, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(FIELDS | FOUR | other))
    with refused("architectures=['EvilForCausalLM'] is not supported"):
        huggingface.load(folder)
    # Nor is somebody asked whether to run it, where transformers makes the tokenizer.
    (folder / "tokenizer.json").unlink()
    settings = {
        "tokenizer_class": "Tokenizer",
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer"] * 2},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with refused("no tokenizer can be made of it"):
        from_folder(folder)


@pytest.mark.parametrize(
    "outside",
    ["../secret.safetensors", "a/../../secret.safetensors", "ABSOLUTE", "/etc/passwd", ".."],
)
def test_an_index_opens_no_file_outside_its_folder(outside, tmp_path):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    name = outside.replace("ABSOLUTE", str(tmp_path / "secret.safetensors"))
    index = {"weight_map": dict.fromkeys(random_tensors(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("model.safetensors.index.json: names the file", "outside its folder"):
        huggingface.load(folder)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    """There every file of a snapshot is a link to ../../blobs: the name in the index decides."""
    for name in ("snapshots", "blobs"):
        (tmp_path / name).mkdir()
    folder = write(tmp_path / "snapshots" / "1")
    (folder / "model.safetensors").rename(tmp_path / "blobs" / "0a1b")
    part = folder / "model-00001-of-00001.safetensors"
    part.symlink_to("../../blobs/0a1b")
    index = {"weight_map": dict.fromkeys(random_tensors(), part.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert huggingface.load(folder).config.num_layers == 1


@pytest.mark.parametrize("outside", ["../rows.json", "/etc/passwd", "a/../../rows.json"])
def test_an_entry_of_datasets_opens_no_file_outside_its_folder(outside, tmp_path):
    info = tmp_path / "in" / "dataset_info.json"
    info.parent.mkdir()
    info.write_text(json.dumps({"set": {"file_name": outside}}))
    with refused("dataset_info.json: 'set' names the file", "outside this folder"):
        formats.dataset_info(info, "set")


def test_a_path_in_a_row_is_text_that_nobody_opens(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    texts = [str(secret), f"file://{secret}", "https://localhost/x", "<image>", f"@{secret}"]
    rows = [{"prompt": x, "completion": x, "path": str(secret), "images": [x]} for x in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []
    watching = [True]

    def watch(event, details):
        if watching[0] and event in ("open", "socket.connect", "socket.getaddrinfo"):
            opened.append(str(details))

    sys.addaudithook(watch)  # which cannot be taken away again
    examples = batches.demonstrations(
        builders.load(tmp_path / "rows.jsonl"), byte_tokenizer(), 200, 200
    )
    watching[0] = False
    assert not [x for x in opened if "secret" in x or "localhost" in x]
    assert opened  # the watch sees
    said = [bytes(row.documents[0].ids[:-1].tolist()).decode() for row in examples.rows]
    assert said == [x * 2 for x in texts]


def test_nothing_listens_on_a_port():
    """No module makes a server; several processes find each other by jax.distributed alone."""
    servers = {"socket", "socketserver", "http", "asyncio", "xmlrpc", "flask", "uvicorn", "tornado"}
    found = {
        (name, alias.split(".")[0])
        for name in FILES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in (
            [x.name for x in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
        if alias.split(".")[0] in servers
    }
    assert found <= {("distributed.py", "socket")}, found  # a client: is process 0 there yet?


def test_a_page_to_label_needs_no_server_and_loads_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a socket is bound")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(socket.socket, "listen", refuse)
    row = {"prompt": "</script><img src=http://x>", "responses": ["<script>1</script>", "b"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    label.main([str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page and "<img src=http" not in page
    assert page.count("</script>") == pages._file("page.html").count("</script>")
