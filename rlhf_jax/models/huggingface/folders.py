"""Model folders of transformers: `config.json` and safetensors files, read and written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import processes, sharding, storage
from rlhf_jax.models import lora, transformer
from rlhf_jax.models.huggingface import configurations, families, files, towers

READ_DTYPES = ("F32", "BF16", "F16")  # as safetensors calls the types that float32 can hold
WRITTEN_DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
LABELS = ("id2label", "label2id", "num_labels", "problem_type")  # fields that classifiers have


def load(
    folder: str | pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    store: str = "float32",
) -> transformer.Model:
    """The language model or reward model in a folder that `save_pretrained` of transformers wrote.

    `store` ("float32" or "bfloat16") is the type of the parameters, whatever the files hold:
    float32 in order to train them, bfloat16 to halve the memory of frozen models. `dtype`
    ("float32" or "bfloat16") is the type in which products are computed. With a mesh each tensor is
    put onto its devices as it is read, so the host holds only one tensor at a time, and of several
    processes each reads the slices that its own devices hold.

    A `*ForSequenceClassification` with one label becomes a model with a scalar head of bias 0.
    transformers scores the last token that is not `pad_token_id`, `heads.sequence_scores` the last
    one where `attend` is 1; where EOS is also the padding, these are different tokens.

    Of a model of text and images or sound (Gemma 3, LLaVA and others, see `towers`) the language
    model is read, and `save` writes it as one.

    Raises ValueError, naming file and tensor, for a folder that holds no model, an architecture or
    setting that is not supported, pickled weights, a damaged file, and a tensor that is missing,
    unknown, of another shape, of a type other than float32, bfloat16 and float16, or not finite.
    """
    if store not in ("float32", "bfloat16"):
        raise ValueError(f"store={store!r}: parameters are kept in 'float32' or 'bfloat16'")
    folder = pathlib.Path(folder)
    config, fields = shape(folder, dtype), files.read_config(folder)
    text = configurations.text_fields(fields)
    family, classifier = configurations.family_of(text)
    shapes = jax.eval_shape(functools.partial(_weights, config, classifier), jax.random.key(0))
    leaves = _by_path(shapes)
    shardings = _by_path(sharding.tree(mesh, shapes)) if mesh else dict.fromkeys(leaves)
    arrays = {}
    with contextlib.ExitStack() as stack:
        stored = _named_as(family, files.open_folder(folder, stack), text is not fields)
        groups = families.groups(family, list(leaves))
        _check(folder, stored, family, groups, leaves)
        if config.tied and not classifier:
            _check_tied(stored, family)
        for name, paths in groups.items():
            where = {path: shardings[path] for path in paths}
            if mesh and len(paths) == 1:
                arrays |= _read_slices(name, stored[name], family, where, store)
            else:
                widths = [leaves[path].shape[-1] for path in paths]
                split = functools.partial(families.split, family, paths, widths, config.num_heads)
                arrays |= _read(name, stored[name], split, where, store)
    if classifier:
        arrays["score/bias"] = _put(np.zeros((1,), store), shardings["score/bias"])

    def array_at(path, _):
        return arrays[sharding.path_name(path)]

    return transformer.Model(config, jax.tree.map_with_path(array_at, shapes))


def shape(folder: str | pathlib.Path, dtype: str = "float32") -> transformer.Config:
    """The configuration of the model in a folder, of which only the config.json is read.

    Raises ValueError as `load` does for what that file says.
    """
    folder = pathlib.Path(folder)
    fields = files.read_config(folder)
    return configurations.config_from(fields, str(folder / "config.json"), dtype)


def _by_path(tree):
    """The leaves of a tree by their paths, for example "layer_0/mlp/up/kernel"."""
    return {sharding.path_name(path): x for path, x in jax.tree.leaves_with_path(tree)}


def _weights(config, classifier, key):
    """Random weights of the model that is read."""
    model = transformer.init(config, key)
    if classifier:
        model = transformer.with_score_head(transformer.without_lm_head(model), None)
    return model.weights


def _named_as(family, stored, is_tower):
    """The stored tensors, or those of a tower, under the names that transformers 4 has for them.

    Some files hold a model without its head and leave out the prefix of its names; transformers 5
    calls the head of every family lm_head.
    """
    stored = towers.tensors_of(stored) if is_tower else stored
    prefix = family.modules["embed"].split(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        heads = tuple(family.modules[x] for x in ("head", "score"))
        stored = {k if k.startswith(heads) else prefix + k: v for k, v in stored.items()}
    head = family.modules["head"] + ".weight"
    return {head if name == "lm_head.weight" else name: x for name, x in stored.items()}


def _check(folder, stored, family, groups, leaves):
    """Raises ValueError unless the folder holds exactly the model's tensors, in its shapes."""
    for name, paths in groups.items():
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name} is missing; config.json asks for it")
        file, handle = stored[name]
        shape = tuple(handle.get_shape())
        wanted = families.stored_shape(family, paths, [leaves[path].shape for path in paths])
        if shape != wanted:
            raise ValueError(
                f"{file}: tensor {name} has shape {shape}, but config.json makes it {wanted}"
            )
        if handle.get_dtype() not in READ_DTYPES:
            raise ValueError(
                f"{file}: tensor {name} is stored as {handle.get_dtype()}, which is not supported; "
                f"convert it to one of {', '.join(READ_DTYPES)}"
            )
    # Tied models may store the embedding a second time, as the head: `_check_tied` compares them.
    known = {*groups, families.stored_name(family, "head/kernel")}
    for name in sorted(stored.keys() - known):
        if not re.fullmatch(family.ignored, name):
            raise ValueError(
                f"{stored[name].file}: tensor {name} is not part of the model that config.json "
                "describes; remove it or correct config.json"
            )


def _check_tied(stored, family):
    """Raises ValueError if a tied model stores a head that is not its embedding."""
    name = families.stored_name(family, "head/kernel")
    head, embedding = stored.get(name), stored[families.stored_name(family, "embed/embedding")]
    if head is not None and not np.array_equal(head.handle[:], embedding.handle[:]):
        raise ValueError(
            f"{head.file}: tensor {name} differs from the embedding, but "
            "config.json has tie_word_embeddings=true; set it to false to keep both"
        )


def _read_slices(name, stored, family, shardings, store):
    """The one array, by its path, that a stored tensor holds; only this process's slices are read.

    (A tensor that joins several arrays is read whole, by `_read`.)
    """
    ((path, where),) = shardings.items()
    shape, read = tuple(stored.handle.get_shape()), {}
    transposed = families.is_transposed(family, path)

    def piece(index):
        stored_index = tuple(reversed(index)) if transposed else index
        bounds = tuple(part.indices(size) for part, size in zip(stored_index, shape))
        if bounds not in read:  # devices may hold the same slice
            part = stored.handle[stored_index].astype(store, copy=False)
            files.check_finite(stored.file, name, part)
            read[bounds] = part.T if transposed else part
        return read[bounds]

    shape_here = shape[::-1] if transposed else shape
    return {path: jax.make_array_from_callback(shape_here, where, piece)}


def _read(name, stored, split, shardings, store):
    """The model's arrays, by path, that one stored tensor holds.

    A function of its own, so that the host's copy of the tensor is freed before the next is read.
    """
    whole = stored.handle[:].astype(store, copy=False)
    files.check_finite(stored.file, name, whole)
    parts = split(whole)
    return {path: _put(part, where) for part, (path, where) in zip(parts, shardings.items())}


def _put(tensor: np.ndarray, where: jax.sharding.Sharding | None) -> jax.Array:
    if where is None:
        return jnp.asarray(tensor)
    # With several hosts device_put would first compare whole tensors across them.
    return jax.make_array_from_callback(tensor.shape, where, lambda index: tensor[index])


def save(
    folder: str | os.PathLike,
    model: transformer.Model,
    *,
    like: str | pathlib.Path | dict[str, Any] | None = None,
    head: Literal["lm", "score"] | None = None,
    dtype: str | None = None,
    fields: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors files, which `from_pretrained` of transformers reads.

    `like` is the folder that the model came from, or its parsed config.json. Without it the model
    is written as the first family that has all of its options, which for a plain model is Llama.
    `fields` are set in config.json on top of that, for example the token ids of a model made here:
    `{"eos_token_id": 1, "pad_token_id": 0}`. `head` is needed for a model with two heads: "lm"
    writes a language model, "score" a `*ForSequenceClassification` with one label.
    `dtype` is "float32", "bfloat16" or "float16"; None means that of `like`, or else float32.
    Tensors are gathered one file at a time, each of at most `max_shard_bytes`.

    Raises ValueError if the folder holds a model already, if a weight is not finite, if `like`
    describes another model, if the head is missing or ambiguous, and for a scalar head that
    transformers cannot represent: its classifiers have no bias, and they find the last token by
    `pad_token_id`, which must therefore be set and must not be an EOS id.

    config.json is written last: a folder without one is incomplete. With several processes all of
    them call this function, and process 0 writes.
    """
    folder = storage.path(folder)
    if lora.has_adapter(model):
        raise ValueError("the model has an adapter; save lora.merge(model), or save_adapter")
    head = choose_head(model, head)
    record = _export_fields(model, like, head == "score", fields)
    family, _ = configurations.family_of(record)
    key = "dtype" if "dtype" in record else "torch_dtype"  # as transformers 5 and 4 call it
    dtype = dtype or record.get(key) or "float32"
    if dtype not in WRITTEN_DTYPES:
        raise ValueError(
            f"dtype={dtype!r} cannot be written; use one of {', '.join(WRITTEN_DTYPES)}"
        )
    check_finite(model.weights, dtype)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.safetensors*")) or (folder / "config.json").exists():
            raise ValueError(f"{folder}: holds a model already; choose another folder or remove it")

    def finish() -> None:
        if head == "lm" and isinstance(like, str | pathlib.Path):
            _copy_generation_config(pathlib.Path(like), folder)
        files.write_json(folder / "config.json", record | {key: dtype})

    processes.first(begin)
    _write_tensors(folder, model, family, head, WRITTEN_DTYPES[dtype], max_shard_bytes)
    processes.first(finish)


def check_finite(weights: Any, dtype: str = "float32") -> None:
    """Raises ValueError, naming the array, for weights that are not all finite as `dtype`.

    An infinity may come from `dtype` alone: float16 ends at 65,504. With several processes all of
    them call this function.
    """
    for path, finite in _by_path(_all_finite(weights, dtype)).items():
        if not finite:
            raise ValueError(
                f"weight {path} is NaN or infinite as {dtype}, so the model is not written; go "
                "back to an earlier checkpoint"
                + (", or write it as float32" if dtype == "float16" else "")
            )


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(weights, dtype):
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x.astype(dtype))), weights)


def _copy_generation_config(like, folder):
    """The generation settings of the model this one came from, where `folder` does not say them."""
    before, here = (x / "generation_config.json" for x in (like, folder))
    if before.is_file():
        own = storage.read_json(here) if here.exists() else {}
        files.write_json(here, storage.read_json(before) | own)


def choose_head(
    model: transformer.Model, head: Literal["lm", "score"] | None
) -> Literal["lm", "score"]:
    """The head to write: `head`, or with None the only one that the model has.

    Raises ValueError if the model has both and `head` is None, if it does not have `head`, and for
    a scalar head with a bias, which transformers' classifiers do not have.
    """
    has = {"lm": model.config.tied or "head" in model.weights, "score": "score" in model.weights}
    if head is None and all(has.values()):
        raise ValueError("the model has a language head and a scalar one: say head='lm' or 'score'")
    head = head or ("score" if has["score"] else "lm")
    if not has[head]:
        raise ValueError(f"head={head!r}: the model has none of that kind")
    bias = np.asarray(model.weights["score"]["bias"]) if head == "score" else 0
    if np.any(bias):
        raise ValueError(
            f"the scalar head's bias is {float(bias[0]):.6g}, and transformers' classifiers have "
            "none; export transformer.without_score_bias(model): all scores shift alike"
        )
    return head


def _export_fields(model, like, classifier, extra):
    """The fields of the config.json to write."""
    if like is None:
        record = configurations.fields_from(model.config, classifier)
        # A family's default token ids would be wrong for another tokenizer.
        record |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    else:
        record = like if isinstance(like, dict) else files.read_config(pathlib.Path(like))
        record = configurations.text_fields(record, "like")
        described = configurations.config_from(record, "like")
        if described != transformer.as_stored(model.config):
            this = dataclasses.asdict(transformer.as_stored(model.config))
            other = dataclasses.asdict(described)
            options = ", ".join(f"{k}={this[k]!r}" for k in this if this[k] != other[k])
            raise ValueError(f"like: describes another model; this one has {options}")
        family, _ = configurations.family_of(record)
        record = {k: v for k, v in record.items() if k not in LABELS}
        record["architectures"] = [family.classifier if classifier else family.causal]
        record |= configurations.ONE_LABEL if classifier else {}
    record |= extra or {}
    pad, eos = record.get("pad_token_id"), record.get("eos_token_id")
    if classifier and (pad is None or pad in (eos if isinstance(eos, list) else [eos])):
        raise ValueError(
            f"pad_token_id={pad}, eos_token_id={eos}: transformers scores the last token that is "
            "not padding, so pad_token_id must be an id that ends no text; set it in fields"
        )
    return record


def _write_tensors(folder, model, family, head, dtype, max_shard_bytes):
    """Writes the tensors in files of at most `max_shard_bytes`, gathering one file at a time.

    Every process gathers each tensor, and only process 0 keeps and writes it.
    """
    left_out = {"lm": "score", "score": "head"}[head]
    weights = {k: v for k, v in model.weights.items() if k != left_out}
    leaves = _by_path(weights)
    shards, room = [], 0
    for name, paths in families.groups(family, list(leaves)).items():
        size = sum(leaves[path].size for path in paths) * dtype.itemsize
        if size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = paths
        room -= size

    def tensor(paths):
        parts = [sharding.to_host(leaves[path]) for path in paths]
        if jax.process_index() != 0:
            return None
        parts = [part.astype(dtype) for part in parts]
        return np.ascontiguousarray(families.join(family, paths, model.config.num_heads, parts))

    file_of, total = {}, 0
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        tensors = {key: tensor(paths) for key, paths in shard.items()}
        if jax.process_index() != 0:
            continue
        files.write_tensors(folder / name, tensors)
        file_of |= dict.fromkeys(tensors, name)
        total += sum(x.nbytes for x in tensors.values())
    if len(shards) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        files.write_json(folder / "model.safetensors.index.json", index)
