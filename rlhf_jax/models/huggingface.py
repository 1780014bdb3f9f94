"""Models in transformers' folders, read without torch: `config.json` and safetensors files."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from rlhf_jax import sharding
from rlhf_jax.models import transformer

# Their name of each of our tensors, by architecture; "{layer}" stands for the layer's number. The
# one table there is: whoever reads or writes these folders goes through `stored_name`.
NAMES = {
    "LlamaForCausalLM": {
        "embed/embedding": "model.embed_tokens.weight",
        "layer_{layer}/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
        "layer_{layer}/attention/query/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
        "layer_{layer}/attention/key/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
        "layer_{layer}/attention/value/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
        "layer_{layer}/attention/out/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
        "layer_{layer}/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
        "layer_{layer}/mlp/gate/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
        "layer_{layer}/mlp/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
        "layer_{layer}/mlp/down/kernel": "model.layers.{layer}.mlp.down_proj.weight",
        "norm/scale": "model.norm.weight",
        "head/kernel": "lm_head.weight",
    },
}

# Buffers that old checkpoints stored; they follow from the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)")

DTYPES = ("F32", "BF16", "F16")  # safetensors' names of what converts to float32 without loss

# Fields that change the model in a way that is not built, and the values that leave it alone.
PLAIN = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


class Stored(NamedTuple):
    """One tensor of a folder, not read yet: which file, and safetensors' handle to it."""

    file: pathlib.Path
    handle: Any


def load(
    folder: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None, dtype: str = "float32"
) -> transformer.Model:
    """The causal language model in a transformers folder (`save_pretrained`).

    Parameters become float32, whatever they are stored as; `dtype` ("float32" or "bfloat16") is
    what products are computed in. With a mesh each tensor goes to its shards as it is read, so
    that the host holds one tensor at a time and no device more than its part.
    Raises ValueError, naming file and tensor, for a folder that is not a model's, an architecture
    or setting that is not built, pickled weights, a damaged file, and for any tensor that is
    missing, not known, misshapen or of a type other than float32, bfloat16 and float16.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a model is a local folder, download it first")
    record = folder / "config.json"
    if not record.is_file():
        raise ValueError(f"{record}: no such file, so {folder} is not a model folder")
    fields = _read_json(record)
    config = config_from(fields, str(record), dtype)
    names = NAMES[fields["architectures"][0]]
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0)).weights
    with contextlib.ExitStack() as stack:
        stored = _open(folder, stack)
        _check(folder, stored, names, shapes)
        if config.tied:
            _check_tied(stored, names)

        trees = (shapes,) if mesh is None else (shapes, sharding.tree(mesh, shapes))

        def read(path, leaf, where=None):
            ours = sharding.path_name(path)
            return _read(stored[stored_name(names, ours)], ours, where)

        return transformer.Model(config, jax.tree.map_with_path(read, *trees))


def stored_name(names: dict[str, str], path: str) -> str:
    """Their name of our tensor: "layer_3/mlp/up/kernel" -> "model.layers.3.mlp.up_proj.weight"."""
    layer = re.match(r"layer_(\d+)/", path)
    if layer is None:
        return names[path]
    return names["layer_{layer}/" + path[layer.end() :]].format(layer=layer[1])


def config_from(
    fields: dict[str, Any], file: str = "config.json", dtype: str = "float32"
) -> transformer.Config:
    """A transformers configuration (the parsed `config.json`) as ours.

    Reads both spellings: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5).
    What may be absent has LlamaConfig's default. `torch_dtype`/`dtype` is not read: it says how
    the tensors are stored, which they say themselves; `dtype` here is what to compute in. Raises
    ValueError naming `file` and the field.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} is not one to compute in; use 'float32' or 'bfloat16'")
    architectures = fields.get("architectures")
    if architectures not in [[name] for name in NAMES]:
        raise ValueError(
            f"{file}: architectures={architectures} is not supported; these are: {', '.join(NAMES)}"
        )
    for name, values in PLAIN.items():
        if name in fields and fields[name] not in values:
            raise ValueError(
                f"{file}: {name}={fields[name]!r} is not supported; only {values[0]!r} is"
            )
    num_heads = _whole(fields, "num_attention_heads", file)
    d_model = _whole(fields, "hidden_size", file)
    config = transformer.Config(
        vocab_size=_whole(fields, "vocab_size", file),
        num_layers=_whole(fields, "num_hidden_layers", file),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=_whole(fields, "num_key_value_heads", file, num_heads),
        head_dim=_whole(fields, "head_dim", file, d_model // num_heads),
        d_ff=_whole(fields, "intermediate_size", file),
        max_length=_whole(fields, "max_position_embeddings", file),
        rope_base=_rope_base(fields, file),
        norm_eps=_real("rms_norm_eps", fields.get("rms_norm_eps", 1e-6), file),
        tied=_switch(fields, "tie_word_embeddings", file),
        dtype=dtype,
    )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"{file}: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"{file}: head_dim={config.head_dim} is odd; rotary positions need pairs")
    return config


def _whole(fields, name, file, default=None):
    """A positive integer field; absent or null means `default`, and an error where that is None."""
    value = fields.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"{file}: {name} is missing; is this a language model's config.json?")
        return default
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {name}={value!r} must be a whole number of at least 1")
    return value


def _switch(fields, name, file):
    """A true-or-false field; absent or null means false."""
    value = fields.get(name)
    if value not in (True, False, None):
        raise ValueError(f"{file}: {name}={value!r} must be true or false")
    return bool(value)


def _real(name, value, file):
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {name}={value!r} must be a positive number")
    return float(value)


def _rope_base(fields, file):
    """The base of the rotary frequencies; refuses anything that rescales them."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{file}: {name}={rope!r} must be an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type": transformers before 4.43
    if kind != "default":
        raise ValueError(
            f"{file}: {name} has rope_type={kind!r}, which is not supported; only 'default' is"
        )
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ValueError(
            f"{file}: {name} has partial_rotary_factor={factor}, which is not supported; only 1 is"
        )
    return _real("rope_theta", rope.get("rope_theta", fields.get("rope_theta", 10000.0)), file)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}: must hold a JSON object, not a {type(record).__name__}")
    return record


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor in the folder by name, none of them read. Files close with `stack`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _open_file(single, stack)
    if not index.is_file():
        pickled = [x for x in sorted(folder.iterdir()) if PICKLED.fullmatch(x.name)]
        if pickled:
            raise ValueError(
                f"{pickled[0]}: pickled weights are not read (a pickle can run any code); convert "
                "them once with transformers' save_pretrained, which writes model.safetensors"
            )
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    stored = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {index.name} names it")
        stored.update(_open_file(folder / name, stack))
    for tensor, name in places.items():
        if tensor not in stored or stored[tensor].file != folder / name:
            raise ValueError(f"{index}: places {tensor} in {name}, which does not hold it")
    return stored


def _open_file(file, stack):
    try:
        opened = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: damaged or not a safetensors file ({error}); fetch it again"
        ) from error
    return {name: Stored(file, opened.get_slice(name)) for name in opened.keys()}


def _check(folder, stored, names, shapes):
    """Raises ValueError unless the folder holds exactly the model's tensors, well shaped."""
    known = set()
    for path, leaf in jax.tree.leaves_with_path(shapes):
        ours = sharding.path_name(path)
        name = stored_name(names, ours)
        known.add(name)
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name} is missing; config.json asks for it")
        file, handle = stored[name]
        shape, wanted = tuple(handle.get_shape()), leaf.shape[:: -1 if _turned(ours) else 1]
        if shape != wanted:
            raise ValueError(
                f"{file}: tensor {name} has shape {shape}, but config.json makes it {wanted}"
            )
        if handle.get_dtype() not in DTYPES:
            raise ValueError(
                f"{file}: tensor {name} is stored as {handle.get_dtype()}, which is not supported; "
                f"convert it to one of {', '.join(DTYPES)}"
            )
    # A copy of the embedding under the head's name is harmless: `_check_tied` compares them.
    known.add(names["head/kernel"])
    for name in sorted(stored.keys() - known):
        if not IGNORED.fullmatch(name):
            raise ValueError(
                f"{stored[name].file}: tensor {name} is not part of the model that config.json "
                "describes; remove it or correct config.json"
            )


def _check_tied(stored, names):
    """A tied model may store its head as well, but then it must be the embedding."""
    head, embedding = (stored.get(names[k]) for k in ("head/kernel", "embed/embedding"))
    if head is not None and not np.array_equal(head.handle[:], embedding.handle[:]):
        raise ValueError(
            f"{head.file}: tensor {names['head/kernel']} differs from the embedding, but "
            "config.json has tie_word_embeddings=true; set it to false to keep both"
        )


def _turned(path: str) -> bool:
    """Kernels are [in, out] here and [out, in] there."""
    return path.endswith("/kernel")


def _read(stored: Stored, path: str, where: jax.sharding.Sharding | None) -> jax.Array:
    tensor = stored.handle[:].astype(np.float32)
    if _turned(path):
        tensor = tensor.T
    if where is None:
        return jnp.asarray(tensor)
    # By shards, not by device_put, which on several hosts would first compare whole tensors.
    return jax.make_array_from_callback(tensor.shape, where, lambda index: tensor[index])
