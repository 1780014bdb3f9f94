"""Import of transformers' folders: the numbers of a real Llama, of torch, and every error.

Other families and export are in test_families.py.
"""

import contextlib
import fnmatch
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rlhf_jax import sampling, sharding
from rlhf_jax.data.records import Ends
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.huggingface import configurations, families

# A Llama of 1 layer, width 8: D = 8, V = 16, 2 query heads and 1 key/value head of 4, F = 12.
FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
FOUR = {"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
FIVE = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "dtype": "bfloat16"}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    LAYER + "input_layernorm.weight": (8,),
    LAYER + "self_attn.q_proj.weight": (8, 8),
    LAYER + "self_attn.k_proj.weight": (4, 8),
    LAYER + "self_attn.v_proj.weight": (4, 8),
    LAYER + "self_attn.o_proj.weight": (8, 8),
    LAYER + "post_attention_layernorm.weight": (8,),
    LAYER + "mlp.gate_proj.weight": (12, 8),
    LAYER + "mlp.up_proj.weight": (12, 8),
    LAYER + "mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}


@jax.jit
def forward(model, tokens, attend):
    return transformer.logits(model, transformer.hidden_states(model, tokens, attend))


def random_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def write(folder, fields=None, tensors=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FIELDS | FOUR if fields is None else fields))
    save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left.weights, right.weights)
    return left.config == right.config


@contextlib.contextmanager
def refused(*parts):
    """A ValueError of one line that holds every part."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# --- the real model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(real_data):
    folder = real_data / "models" / "stories260K"
    return huggingface.load(folder), json.loads((folder / "reference.json").read_text())


def test_stories260k_gives_the_log_probabilities_of_its_reference(stories):
    model, reference = stories
    for case in reference["teacher_forced"]:
        ids = jnp.array([case["input_ids"]])
        logits = forward(model, ids, jnp.ones_like(ids))[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(ids.size - 1), ids[0, 1:]]
        np.testing.assert_allclose(logprobs, case["logprobs_of_next"], atol=1e-4)
        np.testing.assert_allclose(logits[-1], case["last_logits"], atol=1e-4)
        assert abs(-logprobs.mean() - case["mean_nll"]) < 1e-5


def test_stories260k_continues_greedily_as_its_reference_token_for_token(stories):
    model, reference = stories
    cases = reference["greedy"]
    width = max(len(case["prompt_ids"]) for case in cases)
    new = max(len(case["output_ids"]) - len(case["prompt_ids"]) for case in cases)
    prompts = [case["prompt_ids"] for case in cases]
    tokens, attend = left_padded(prompts, width)  # both prompts in one batch, one of them padded
    samples = jax.jit(
        lambda model: sampling.sample(
            model,
            tokens,
            attend,
            sampling.row_keys(jax.random.key(0), jnp.arange(len(cases))),
            sampling=sampling.Sampling(max_new_tokens=new),
            ends=Ends((1, 2), 0),
            choose=sampling.greedy,
        )
    )(model)
    for case, row, mask in zip(cases, samples.tokens, samples.mask):
        want = case["output_ids"][len(case["prompt_ids"]) :]
        assert row[width : width + len(want)].tolist() == want
        assert np.all(mask[width : width + len(want)] == 1)


def test_stories260k_goes_back_as_it_came(stories, real_data, tmp_path):
    folder = real_data / "models" / "stories260K"
    huggingface.save(tmp_path / "out", stories[0], like=folder)
    assert equal(huggingface.load(tmp_path / "out"), stories[0])
    before, after = (
        json.loads((x / "config.json").read_text()) for x in (folder, tmp_path / "out")
    )
    assert after == before | {x: after[x] for x in ("dtype", "torch_dtype") if x in after}


def test_stories260k_loads_onto_eight_devices_in_shards_and_says_the_same(stories, real_data):
    whole, reference = stories
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = huggingface.load(real_data / "models" / "stories260K", mesh)
    assert equal(model, whole)
    for path, leaf in jax.tree.leaves_with_path(model.weights):
        assert len(leaf.addressable_shards) == 8
        if leaf.ndim == 2:  # norms are whole everywhere
            held = {shard.data.size for shard in leaf.addressable_shards}
            assert held == {leaf.size // 8}, sharding.path_name(path)
    ids = jnp.tile(jnp.array(reference["teacher_forced"][0]["input_ids"]), (8, 1))
    want = forward(whole, ids, jnp.ones_like(ids))
    with jax.set_mesh(mesh):
        ids = sharding.put_rows(mesh, ids)
        np.testing.assert_allclose(forward(model, ids, jnp.ones_like(ids)), want, atol=1e-4)


def left_padded(rows, width):
    tokens, attend = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], attend[i, width - len(row) :] = row, 1
    return jnp.asarray(tokens), jnp.asarray(attend)


# --- torch --------------------------------------------------------------------------------------

LLAMAS = {
    "multi-head, untied": dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=24, rope_theta=10000.0,
    ),
    "two queries a key, tied, wide heads": dict(
        vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=20, head_dim=16, tie_word_embeddings=True,
        rope_theta=100.0,
    ),
    "four queries a key, untied, many files": dict(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=40, rope_theta=500000.0, rms_norm_eps=1e-3,
    ),
}  # fmt: skip


# save_pretrained reads config.json back without closing it (transformers 5.23).
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", LLAMAS)
def test_a_random_llama_says_and_continues_as_torch_does_under_left_padding(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        max_position_embeddings=32,
        initializer_range=0.3,  # logits of order 1 and attention that looks somewhere
        eos_token_id=None,
        **LLAMAS[name],
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, tensor in theirs.named_parameters():
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if "files" in name else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("files" in name)
    ours = huggingface.load(tmp_path)

    rng = np.random.default_rng(0)
    tokens, attend = left_padded([rng.integers(1, 40, n) for n in (9, 5, 2, 1)], 9)
    ids, mask = torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(attend)).long()
    with torch.no_grad():
        want = theirs(
            input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1) - mask
        ).logits.numpy()
    got, real = np.asarray(forward(ours, tokens, attend)), np.asarray(attend) > 0
    assert np.abs(want[real]).max() > 1
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)

    new = 12
    generate = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
    free = theirs.generate(ids, pad_token_id=0, **generate).numpy()
    eos = int(free[0, 9 + 4])  # so that the first row, at least, ends early
    want = theirs.generate(ids, pad_token_id=0, eos_token_id=eos, **generate).numpy()
    got = jax.jit(
        lambda model: sampling.sample(
            model,
            tokens,
            attend,
            sampling.row_keys(jax.random.key(0), jnp.arange(4)),
            sampling=sampling.Sampling(max_new_tokens=new),
            ends=Ends((eos,), 0),
            choose=sampling.greedy,
        )
    )(ours)
    assert got.lengths[0] <= 5
    np.testing.assert_array_equal(got.tokens[:, : want.shape[1]], want)


# --- reading ------------------------------------------------------------------------------------


def test_both_spellings_of_the_configuration_say_the_same():
    want = transformer.Config(
        vocab_size=16,
        num_layers=1,
        d_model=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        d_ff=12,
        max_length=32,
        rope_base=500.0,
        norm_eps=1e-5,
        tied=False,
    )
    assert configurations.config_from(FIELDS | FOUR) == want
    assert configurations.config_from(FIELDS | FIVE) == want
    assert configurations.config_from(FIELDS | FIVE, dtype="bfloat16").dtype == "bfloat16"
    old = FOUR | {"rope_scaling": {"type": "default"}}
    assert configurations.config_from(FIELDS | old) == want


def test_what_a_configuration_leaves_out_has_the_default_of_transformers():
    optional = ("num_key_value_heads", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias")
    fields = {k: v for k, v in FIELDS.items() if k not in (*optional, "tie_word_embeddings")}
    config = configurations.config_from(fields | {"head_dim": None})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (2, 4, 1e-6)
    assert (config.rope_base, config.tied) == (10000.0, False)


def test_every_tensor_lands_in_its_place_with_kernels_transposed(tmp_path):
    tensors = random_tensors()
    weights = huggingface.load(write(tmp_path)).weights
    block = weights["layer_0"]
    places = {
        "model.embed_tokens.weight": weights["embed"]["embedding"],
        LAYER + "input_layernorm.weight": block["attention_norm"]["scale"],
        LAYER + "self_attn.q_proj.weight": block["attention"]["query"]["kernel"].T,
        LAYER + "self_attn.k_proj.weight": block["attention"]["key"]["kernel"].T,
        LAYER + "self_attn.v_proj.weight": block["attention"]["value"]["kernel"].T,
        LAYER + "self_attn.o_proj.weight": block["attention"]["out"]["kernel"].T,
        LAYER + "post_attention_layernorm.weight": block["mlp_norm"]["scale"],
        LAYER + "mlp.gate_proj.weight": block["mlp"]["gate"]["kernel"].T,
        LAYER + "mlp.up_proj.weight": block["mlp"]["up"]["kernel"].T,
        LAYER + "mlp.down_proj.weight": block["mlp"]["down"]["kernel"].T,
        "model.norm.weight": weights["norm"]["scale"],
        "lm_head.weight": weights["head"]["kernel"].T,
    }
    assert len(jax.tree.leaves(weights)) == len(places) == len(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(places[name], tensor)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32_parameters_of_the_same_values(dtype, tmp_path):
    half = random_tensors(dtype)
    single = {name: tensor.astype(np.float32) for name, tensor in half.items()}
    got = huggingface.load(write(tmp_path / "half", tensors=half))
    assert {x.dtype for x in jax.tree.leaves(got.weights)} == {jnp.dtype("float32")}
    assert equal(got, huggingface.load(write(tmp_path / "single", tensors=single)))


def test_the_dtype_asked_for_is_what_products_are_computed_in(tmp_path):
    model = huggingface.load(write(tmp_path), dtype="bfloat16")
    tokens = jnp.ones((1, 2), jnp.int32)
    assert jax.eval_shape(transformer.hidden_states, model, tokens, tokens).dtype == jnp.bfloat16
    with refused("dtype='float16'", "'float32' or 'bfloat16'"):
        huggingface.load(tmp_path, dtype="float16")


def test_what_is_stored_as_bfloat16_holds_half_the_bytes_of_the_same_values(tmp_path):
    write(tmp_path, tensors=random_tensors(ml_dtypes.bfloat16))
    wide, half = huggingface.load(tmp_path), huggingface.load(tmp_path, store="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.weights)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, half.weights, wide.weights)
    tokens = jnp.arange(6)[None]
    got, want = (forward(model, tokens, jnp.ones_like(tokens)) for model in (half, wide))
    np.testing.assert_allclose(got, want, atol=1e-5)
    with refused("store='float16'", "'float32' or 'bfloat16'"):
        huggingface.load(tmp_path, store="float16")


LOAD_AND_MEASURE = """
import sys, threading, time, jax
from rlhf_jax import sharding
from rlhf_jax.models import huggingface

folder, whose = sys.argv[1:]
if whose == "theirs":
    import transformers

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))

def device():
    return sum(x.nbytes for x in jax.live_arrays())  # replicated ones are counted once

def watch():
    while not done:
        # What is live is read first: in between it can only have grown.
        live, used = device(), anonymous() - base
        peak[:] = max(peak[0], used - live), max(peak[1], used)
        time.sleep(0.005)

mesh = sharding.make_mesh(fsdp=4, tensor=2)
jax.block_until_ready(jax.device_put(0.0))
base, peak, done = anonymous(), [0, 0], False
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
if whose == "ours":
    model = jax.block_until_ready(huggingface.load(folder, mesh))
    sizes = [x.nbytes for x in jax.tree.leaves(model.weights)]
else:
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    sizes = [x.nbytes for x in model.parameters()]
    sum(float(x.sum()) for x in model.parameters())  # as what is mapped is read at first use
seconds = time.perf_counter() - start
done = True
watcher.join()
print(peak[0] / max(sizes), peak[1] / 1e9, sum(sizes) / 1e9, seconds)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_loading_2_gb_over_eight_devices_needs_at_most_three_times_the_largest_tensor(tmp_path):
    """Anonymous memory of the host beyond the device shards and what was there before."""
    fields = FIELDS | dict(vocab_size=32000, hidden_size=2048, intermediate_size=8192)
    fields |= dict(num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=16)
    config = configurations.config_from(fields)
    family, _ = configurations.family_of(fields)
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))).weights
    places, rng = {}, np.random.default_rng(0)
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(shapes)):
        name, file = families.stored_name(family, sharding.path_name(path)), f"{i}.safetensors"
        shape = families.stored_shape(family, [sharding.path_name(path)], [leaf.shape])
        save_file({name: rng.random(shape, np.float32)}, tmp_path / file, {"format": "pt"})
        places[name] = file
    (tmp_path / "config.json").write_text(json.dumps(fields))
    index = json.dumps({"metadata": {}, "weight_map": places})
    (tmp_path / "model.safetensors.index.json").write_text(index)

    def measured(whose):
        done = subprocess.run(
            [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path), whose],
            capture_output=True,
            text=True,
            check=True,
            cwd=pathlib.Path(__file__).parents[1],
        )
        largest, peak, size, seconds = map(float, done.stdout.split())
        print(f"{whose}: {size:.2f} GB in {seconds:.1f} s, anonymous memory up to {peak:.2f} GB")
        return largest, size

    largest, size = measured("ours")
    print(f"beyond the device shards {largest:.2f} times the largest tensor")
    assert size > 2 and largest < 3
    if importlib.util.find_spec("torch"):
        measured("theirs")


def test_a_name_on_the_hub_is_fetched_without_pickles_or_code_and_a_folder_is_itself(
    tmp_path, monkeypatch
):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(write(tmp_path / "fetched"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = huggingface.fetch("org/name-1.5B")
    huggingface.load(folder)
    assert huggingface.fetch(folder) == folder and len(asked) == 1
    name, patterns = asked[0]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt"]
    other = ["pytorch_model.bin", "modeling.py", "consolidated.safetensors", "tf_model.h5"]

    def allowed(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    assert name == "org/name-1.5B" and all(map(allowed, wanted)) and not any(map(allowed, other))
    with refused("absent", "no such folder", "org/name"):
        huggingface.fetch("absent")
    for path in ("./absent/model", "../model", "~/model", "/absent/model", ".hidden/model"):
        with refused(f"{path}: no such folder"):
            huggingface.fetch(path)
    assert len(asked) == 1


class Answer:
    """As much of a response of the hub as its errors ask for."""

    headers, request = {}, None


@pytest.mark.parametrize(
    "name, parts",
    [
        (
            "RepositoryNotFoundError",
            ["neither a folder here nor a model on the hub", "check the spelling", "log in"],
        ),
        ("GatedRepoError", ["gated", "accept its licence", "on its page there"]),
        ("LocalEntryNotFoundError", ["no such folder here", "could not be read (No connection.)"]),
        ("HFValidationError", ["neither a folder here nor a model on the hub"]),
    ],
)
def test_what_the_hub_does_not_give_is_refused_in_one_line_with_the_remedy(
    name, parts, monkeypatch
):
    errors = pytest.importorskip("huggingface_hub.errors")
    kind = getattr(errors, name)
    answered = issubclass(kind, errors.HfHubHTTPError) and name != "LocalEntryNotFoundError"

    def snapshot_download(*args, **kwargs):
        raise kind("No connection.\nSeveral\nlines.", **({"response": Answer} if answered else {}))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with refused("org/nmae: ", *parts):
        huggingface.fetch("org/nmae")


def test_a_model_that_is_only_pickled_on_the_hub_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))  # what the patterns let through
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with refused("org/old: ", "no safetensors", "pickle", "convert", "save_pretrained"):
        huggingface.fetch("org/old")


def test_the_folder_of_an_adapter_says_how_to_load_it(tmp_path):
    record = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    with refused(tmp_path, "an adapter of org/base", "load org/base, then load_adapter"):
        huggingface.load(tmp_path)


def split(folder):
    """The folder's tensors over two files with an index; returns the index's record."""
    tensors = random_tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= {name: file for name in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_several_files_with_an_index_are_read_as_one(tmp_path):
    whole = huggingface.load(write(tmp_path))
    split(tmp_path)
    assert equal(huggingface.load(tmp_path), whole)


def test_the_rotary_buffers_of_old_checkpoints_and_a_copied_tied_head_are_passed_over(tmp_path):
    tensors = random_tensors()
    plain = huggingface.load(write(tmp_path / "plain"))
    buffer = {LAYER + "self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert equal(huggingface.load(write(tmp_path / "old", tensors=tensors | buffer)), plain)

    fields = FIELDS | FOUR | {"tie_word_embeddings": True}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    tied = huggingface.load(write(tmp_path / "tied", fields, tensors | head))
    assert tied.config.tied and "head" not in tied.weights
    with refused("lm_head.weight differs from the embedding", "tie_word_embeddings"):
        huggingface.load(write(tmp_path / "untied", fields, tensors))


def test_loading_imports_no_torch(tmp_path):
    write(tmp_path)
    program = (
        "import sys; from rlhf_jax.models import huggingface; huggingface.load(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"


# --- refusing -----------------------------------------------------------------------------------


def test_what_is_not_a_model_folder_is_refused(tmp_path):
    with refused(tmp_path / "absent", "no such folder", "fetch('org/name')"):
        huggingface.load(tmp_path / "absent")
    with refused(tmp_path / "config.json", "no such file", "not a model folder"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    with refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json"):
        huggingface.load(tmp_path)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with refused(tmp_path / "pytorch_model.bin", "pickle", "convert", "save_pretrained"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    "change, parts",
    [
        (
            {"architectures": ["BertForMaskedLM"]},
            ["BertForMaskedLM", "these are: LlamaForCausalLM", "OPTForSequenceClassification"],
        ),
        ({"architectures": None}, ["architectures=None"]),
        ({"architectures": []}, ["architectures=[]"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["mixture of experts, none of which"]),
        ({"architectures": ["MixtralForCausalLM"]}, ["mixture of experts, none of which"]),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ["num_labels=2", "only 1, a score"],
        ),
        ({"hidden_act": "glu"}, ["hidden_act='glu'", "these are: silu, swish, gelu"]),
        ({"sliding_window": 4096}, ["sliding_window=4096"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor=None must be a positive"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            ["rope_scaling.low_freq_factor=None must be a positive number"],
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            ["rope_scaling.short_factor must be a list of 2 numbers"],
        ),
        ({"rope_scaling": "linear"}, ["rope_scaling='linear' must be an object"]),
        (
            {"rope_parameters": {"rope_type": "axial"}},
            ["rope_parameters has rope_type='axial'", "default, linear, dynamic, llama3, yarn"],
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            ["rope_parameters", "partial_rotary_factor=0.25"],
        ),
        ({"rope_theta": 0}, ["rope_theta=0 must be a positive number"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan must be a positive number"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"hidden_size": "8"}, ["hidden_size='8' must be a whole number"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0 must be a whole number of at least 1"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=2", "num_key_value_heads=3"]),
        ({"head_dim": 3}, ["head_dim=3 is odd"]),
        ({"id2label": 5}, ["id2label=5 must be an object or null"]),
        (
            {"rope_scaling": {"rope_type": "axial"}, "rope_parameters": {"rope_type": "default"}},
            ["rope_scaling has rope_type='axial'"],
        ),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings='no' must be true or false"]),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_built_is_refused_by_field(change, parts):
    with refused("folder/config.json: ", *parts):
        configurations.config_from(FIELDS | FOUR | change, "folder/config.json")


@pytest.mark.parametrize(
    "text, parts",
    [
        (b'{"vocab_size": 16,\n "hidden_size"', [":2: not JSON"]),
        (b"[1, 2]", ["must hold a JSON object, not a list"]),
        (b'{"model_type": "\xff"}', ["not UTF-8"]),
    ],
)
def test_a_malformed_json_file_is_refused_by_line(text, parts, tmp_path):
    write(tmp_path)
    split(tmp_path)
    for name in ("model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_bytes(text)
        with refused(tmp_path / name, *parts):
            huggingface.load(tmp_path)


def test_tensors_that_are_missing_unknown_misshapen_or_of_another_type_are_refused(tmp_path):
    tensors, query = random_tensors(), LAYER + "self_attn.q_proj.weight"
    file = tmp_path / "model.safetensors"
    write(tmp_path, tensors={k: v for k, v in tensors.items() if k != query})
    with refused(tmp_path, f"tensor {query} is missing"):
        huggingface.load(tmp_path)
    bias = LAYER + "self_attn.q_proj.bias"
    write(tmp_path, tensors=tensors | {bias: np.zeros(8, np.float32)})
    with refused(file, f"tensor {bias} is not part of the model"):
        huggingface.load(tmp_path)
    down = LAYER + "mlp.down_proj.weight"
    write(tmp_path, tensors=tensors | {down: np.ascontiguousarray(tensors[down].T)})
    with refused(file, f"tensor {down} has shape (12, 8)", "config.json makes it (8, 12)"):
        huggingface.load(tmp_path)
    write(tmp_path, tensors=tensors | {query: np.zeros((8, 8), np.int8)})
    with refused(file, f"tensor {query} is stored as I8", "F32, BF16, F16"):
        huggingface.load(tmp_path)
    write(tmp_path, FIELDS | FOUR | {"num_hidden_layers": 2})
    with refused(tmp_path, "model.layers.1.", "is missing"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "git-lfs pointer"])
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    file = write(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    file.write_bytes({"truncated": whole[:-7], "empty": b"", "git-lfs pointer": pointer}[damage])
    with refused(file, "damaged or not a safetensors file", "fetch it again"):
        huggingface.load(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    write(tmp_path)
    index = split(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    moved = index["weight_map"] | {"lm_head.weight": second}
    file.write_text(json.dumps({"weight_map": moved}))
    with refused(file, f"places lm_head.weight in {second}, which does not hold it"):
        huggingface.load(tmp_path)
    file.write_text(json.dumps({"weight_map": [first]}))
    with refused(file, "weight_map must map tensor names to file names"):
        huggingface.load(tmp_path)
    file.write_text(json.dumps(index))
    (tmp_path / first).unlink()
    with refused(tmp_path / first, "no such file", "index.json names it"):
        huggingface.load(tmp_path)


OTHERS = {
    "gpt2": dict(architectures=["GPT2LMHeadModel"], vocab_size=16, n_embd=8, n_layer=1, n_head=2),
    "opt": FIELDS | dict(architectures=["OPTForCausalLM"], ffn_dim=12, max_position_embeddings=32),
    "gemma2": FIELDS | dict(architectures=["Gemma2ForCausalLM"]),
    "gemma3": FIELDS | dict(architectures=["Gemma3ForCausalLM"]),
    "neox": FIELDS | dict(architectures=["GPTNeoXForCausalLM"], rotary_pct=0.5),
}


@pytest.mark.parametrize(
    "name, change, parts",
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["only False"]),
        ("gpt2", {"scale_attn_weights": False}, ["only True"]),
        ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before=False", "only True"]),
        ("opt", {"word_embed_proj_dim": 4}, ["word_embed_proj_dim=4", "only hidden_size"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["only False"]),
        ("gemma2", {"layer_types": 5}, ["layer_types must name full_attention or"]),
        ("gemma3", {"rope_parameters": {"full_attention": 5}}, ["an object or null for each"]),
        ("gemma2", {"layer_types": ["chunked"]}, ["layer_types must name full_attention or"]),
        ("gpt2", {"activation_function": ["gelu"]}, ["['gelu'] is not supported", "gelu_new"]),
        ("gemma2", {"final_logit_softcapping": 0}, ["must be a positive number"]),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            ["sliding_attention is scaled"],
        ),
        ("neox", {"rotary_pct": 0.75}, ["rotary_pct=0.75 of 4 is odd"]),
    ],
    ids=str,
)
def test_a_setting_of_another_family_that_is_not_built_is_refused_by_field(name, change, parts):
    with refused("config.json: ", *change, *parts):
        configurations.config_from(OTHERS[name] | change)
    configurations.config_from(OTHERS[name])


def test_tensors_of_a_trunk_alone_are_found_without_their_prefix(tmp_path):
    """As in the first GPT-2 files, which also hold their masks."""
    config = configurations.config_from(OTHERS["gpt2"])
    model = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    huggingface.save(tmp_path / "named", model)
    with safe_open(tmp_path / "named" / "model.safetensors", framework="numpy") as file:
        tensors = {k.removeprefix("transformer."): file.get_tensor(k) for k in file.keys()}
    assert "h.0.attn.c_attn.weight" in tensors
    mask = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    write(tmp_path / "bare", OTHERS["gpt2"], tensors | mask)
    assert equal(huggingface.load(tmp_path / "bare"), model)


def test_every_parameter_of_a_causal_model_has_a_name():
    family, _ = configurations.family_of(FIELDS)
    config = configurations.config_from(FIELDS | FOUR | {"num_hidden_layers": 3})
    tree = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0)).weights
    paths = [sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    stored = [families.stored_name(family, path) for path in paths]
    assert len(set(stored)) == len(paths) == 3 + 9 * 3
