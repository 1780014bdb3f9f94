"""Models in transformers' folders, read and written without torch: `config.json`, safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import sharding
from rlhf_jax.models import adapters, configs, families, lora, transformer

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)")

FETCHED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    *ADAPTER_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]

DTYPES = ("F32", "BF16", "F16")  # safetensors' names of what converts to float32 without loss
EXPORTED = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
LABELS = ("id2label", "label2id", "num_labels", "problem_type")  # of classifiers


class Stored(NamedTuple):
    """One tensor of a folder, not read yet: which file, and safetensors' handle to it."""

    file: pathlib.Path
    handle: Any


def load(
    folder: str | pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    store: str = "float32",
) -> transformer.Model:
    """The language model or scorer in a transformers folder (`save_pretrained`).

    `store` ("float32" or "bfloat16") is what parameters become, whatever the files hold: float32
    to train them, bfloat16 for half the memory of those that stay as they are. `dtype` (of the
    same two) is what products are computed in. With a mesh each tensor goes to its shards as it is
    read, so that the host holds one tensor at a time and no device more than its part.
    A `*ForSequenceClassification` of one label becomes a model with a scalar head of bias 0.
    There transformers scores the last token that is not `pad_token_id`, `heads.sequence_scores`
    the last that `attend` marks: with a padding that is also EOS these differ by a token.
    Raises ValueError, naming file and tensor, for a folder that is not a model's, an architecture
    or setting that is not built, pickled weights, a damaged file, and for any tensor that is
    missing, not known, misshapen or of a type other than float32, bfloat16 and float16.
    """
    if store not in ("float32", "bfloat16"):
        raise ValueError(f"store={store!r} is not one to keep; use 'float32' or 'bfloat16'")
    folder = pathlib.Path(folder)
    fields = _fields_of(folder)
    config = configs.config_from(fields, str(folder / "config.json"), dtype)
    family, classifier = configs.family_of(fields)

    def fresh(key):
        model = transformer.init(config, key)
        if classifier:
            model = transformer.with_score_head(transformer.without_lm_head(model), None)
        return model.weights

    shapes = jax.eval_shape(fresh, jax.random.key(0))
    leaves = {sharding.path_name(path): x for path, x in jax.tree.leaves_with_path(shapes)}
    places = dict.fromkeys(leaves)
    if mesh is not None:
        wanted = jax.tree.leaves_with_path(sharding.tree(mesh, shapes))
        places = {sharding.path_name(path): x for path, x in wanted}
    arrays = {}
    with contextlib.ExitStack() as stack:
        stored = _named_as(family, _open(folder, stack))
        groups = families.groups(family, list(leaves))
        _check(folder, stored, family, groups, leaves)
        if config.tied and not classifier:
            _check_tied(stored, family)
        for name, paths in groups.items():
            widths = [leaves[path].shape[-1] for path in paths]
            cut = functools.partial(families.split, family, paths, widths, config.num_heads)
            arrays |= _read(stored[name], cut, {path: places[path] for path in paths}, store)
    if classifier:
        arrays["score/bias"] = _put(np.zeros((1,), store), places["score/bias"])
    fill = lambda path, leaf: arrays[sharding.path_name(path)]  # noqa: E731
    return transformer.Model(config, jax.tree.map_with_path(fill, shapes))


def fetch(name: str | pathlib.Path) -> pathlib.Path:
    """A model's folder: `name` itself where it is one, else `org/name` from the Hugging Face hub.

    Downloads configuration, safetensors and tokenizer files only: never pickles, never code.
    Raises ValueError for what is neither a folder nor a model there that can be read.
    """
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    name = str(name)
    if name.startswith((".", "~", "/")):
        raise ValueError(f"{name}: no such folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name}: no such folder, and not the org/name of a model on the hub")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=FETCHED))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name}: gated on the hub; accept its licence on its page there and log in with "
            "`hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"{name}: neither a folder here nor a model on the hub; check the spelling, or log in "
            "with `hf auth login` if it is private"
        ) from error
    except OSError as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name}: no such folder here, and the hub could not be read ({why})"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name}: the hub has no safetensors files of it; pickled weights (.bin) are not read "
            "(a pickle can run any code): convert them once with transformers' save_pretrained"
        )
    return folder


def _fields_of(folder: pathlib.Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; a model is a local folder; fetch('org/name') downloads one"
        )
    record, adapter = folder / "config.json", folder / ADAPTER_FILES[0]
    if not record.is_file() and adapter.is_file():
        base = _read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: an adapter of {base}, not a model; load {base}, then "
            "load_adapter(folder, model, like=its folder)"
        )
    if not record.is_file():
        raise ValueError(f"{record}: no such file, so {folder} is not a model folder")
    return _read_json(record)


def _named_as(family, stored):
    """Tensors under the names of a whole model: some files hold a trunk alone, without its prefix,
    and transformers 5 calls every head lm_head."""
    prefix = family.modules["embed"].split(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        heads = tuple(family.modules[x] for x in ("head", "score"))
        stored = {k if k.startswith(heads) else prefix + k: v for k, v in stored.items()}
    head = family.modules["head"] + ".weight"
    return {head if name == "lm_head.weight" else name: x for name, x in stored.items()}


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


def _check(folder, stored, family, groups, leaves):
    """Raises ValueError unless the folder holds exactly the model's tensors, well shaped."""
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
        if handle.get_dtype() not in DTYPES:
            raise ValueError(
                f"{file}: tensor {name} is stored as {handle.get_dtype()}, which is not supported; "
                f"convert it to one of {', '.join(DTYPES)}"
            )
    # A copy of the embedding under the head's name is harmless: `_check_tied` compares them.
    known = {*groups, families.stored_name(family, "head/kernel")}
    for name in sorted(stored.keys() - known):
        if not re.fullmatch(family.ignored, name):
            raise ValueError(
                f"{stored[name].file}: tensor {name} is not part of the model that config.json "
                "describes; remove it or correct config.json"
            )


def _check_tied(stored, family):
    """A tied model may store its head as well, but then it must be the embedding."""
    name = families.stored_name(family, "head/kernel")
    head, embedding = stored.get(name), stored[families.stored_name(family, "embed/embedding")]
    if head is not None and not np.array_equal(head.handle[:], embedding.handle[:]):
        raise ValueError(
            f"{head.file}: tensor {name} differs from the embedding, but "
            "config.json has tie_word_embeddings=true; set it to false to keep both"
        )


def _read(stored, cut, places, store):
    """Ours of one of their tensors; what the host held of it is free again on return."""
    parts = cut(stored.handle[:].astype(store, copy=False))
    return {path: _put(part, where) for part, (path, where) in zip(parts, places.items())}


def _put(tensor: np.ndarray, where: jax.sharding.Sharding | None) -> jax.Array:
    if where is None:
        return jnp.asarray(tensor)
    # By shards, not by device_put, which on several hosts would first compare whole tensors.
    return jax.make_array_from_callback(tensor.shape, where, lambda index: tensor[index])


def save(
    folder: str | pathlib.Path,
    model: transformer.Model,
    *,
    like: str | pathlib.Path | dict[str, Any] | None = None,
    head: Literal["lm", "score"] | None = None,
    dtype: str | None = None,
    fields: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model as transformers' `from_pretrained` reads it: config.json and safetensors.

    `like`: the folder the model came from, or its parsed config.json; without it the family is
    the first that can say all of the model's options (a plain one becomes a Llama). `fields` are
    set in config.json on top of that: say there what token ids a model made here uses, e.g.
    `{"eos_token_id": 1, "pad_token_id": 0}`. `head`: which head to write, where a model has both
    that of the language and the scalar one ("score": a `*ForSequenceClassification` of one label).
    `dtype` is "float32", "bfloat16" or "float16"; None means that of `like`, else float32. One
    file of at most `max_shard_bytes` is in memory at a time; several files get an index.

    Raises ValueError if the folder holds a model already, `like` describes another one, the head
    is missing or ambiguous, or a scalar head cannot be said there: transformers has no bias, and
    finds the last token by `pad_token_id`, which must be set and not be an EOS id.
    """
    folder = pathlib.Path(folder)
    if lora.has_adapter(model):
        raise ValueError("the model has an adapter; save lora.merge(model), or save_adapter")
    head = _which_head(model, head)
    record = _export_fields(model, like, head == "score", fields)
    family, _ = configs.family_of(record)
    spelled = "dtype" if "dtype" in record else "torch_dtype"
    dtype = dtype or record.get(spelled) or "float32"
    if dtype not in EXPORTED:
        raise ValueError(f"dtype={dtype!r} cannot be written; use one of {', '.join(EXPORTED)}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors*")) or (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a model already; choose another folder or remove it")
    _write_tensors(folder, model, family, head, EXPORTED[dtype], max_shard_bytes)
    _write_json(folder / "config.json", record | {spelled: dtype})
    if head == "lm" and isinstance(like, str | pathlib.Path):
        generation = pathlib.Path(like) / "generation_config.json"
        if generation.is_file():
            _write_json(folder / generation.name, _read_json(generation))


def _which_head(model, head):
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
    if like is None:
        record = configs.fields_from(model.config, classifier)
        # Llama's own token ids would be wrong for another tokenizer.
        record |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    else:
        record = like if isinstance(like, dict) else _fields_of(pathlib.Path(like))
        described = configs.config_from(record, "like", model.config.dtype)
        if described != model.config:
            ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(described)
            other = ", ".join(f"{k}={ours[k]!r}" for k in ours if ours[k] != theirs[k])
            raise ValueError(f"like: describes another model; this one has {other}")
        family, _ = configs.family_of(record)
        record = {k: v for k, v in record.items() if k not in LABELS}
        record["architectures"] = [family.classifier if classifier else family.causal]
        record |= configs.ONE_LABEL if classifier else {}
    record |= extra or {}
    pad, eos = record.get("pad_token_id"), record.get("eos_token_id")
    if classifier and (pad is None or pad in (eos if isinstance(eos, list) else [eos])):
        raise ValueError(
            f"pad_token_id={pad}, eos_token_id={eos}: transformers scores the last token that is "
            "not padding, so pad_token_id must be an id that ends no text; set it in fields"
        )
    return record


def _write_tensors(folder, model, family, head, dtype, max_shard_bytes):
    """The tensors in files of at most `max_shard_bytes`, one file gathered at a time."""
    left_out = {"lm": "score", "score": "head"}[head]
    weights = {k: v for k, v in model.weights.items() if k != left_out}
    leaves = {sharding.path_name(path): x for path, x in jax.tree.leaves_with_path(weights)}
    files, room = [], 0
    for name, paths in families.groups(family, list(leaves)).items():
        size = sum(leaves[path].size for path in paths) * dtype.itemsize
        if size > room:
            files.append({})
            room = max_shard_bytes
        files[-1][name] = paths
        room -= size

    def tensor(paths):
        parts = [np.asarray(leaves[path]).astype(dtype) for path in paths]
        return np.ascontiguousarray(families.join(family, paths, model.config.num_heads, parts))

    places, total = {}, 0
    for i, file in enumerate(files, start=1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            name = "model.safetensors"
        tensors = {key: tensor(paths) for key, paths in file.items()}
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(x.nbytes for x in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(file, record):
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# --- adapters -------------------------------------------------------------------------------------


def save_adapter(
    folder: str | pathlib.Path,
    model: transformer.Model,
    *,
    like: str | pathlib.Path,
    head: Literal["lm", "score"] | None = None,
) -> None:
    """Writes the model's adapter as peft reads it on top of `like`, the base's folder.

    `head`: which head the adapter is for, where a model has both. A scorer's ("score") is written
    with the adapter, for `AutoModelForSequenceClassification` of `num_labels=1`, which needs the
    base's `pad_token_id` to find the last token.
    Raises ValueError for a model without an adapter, for a scalar head with a bias, which has no
    place there (see `transformer.without_score_bias`), and for a family whose kernels transformers
    keeps fused (GPT-2, Phi-3, GPT-NeoX): there an adapter of ours is not one of theirs; export
    `lora.merge(model)` instead.
    """
    head = _which_head(model, head)
    family, _ = configs.family_of(_fields_of(pathlib.Path(like)))
    record, tensors = adapters.to_peft(model, family, head, str(like))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
    _write_json(folder / ADAPTER_FILES[0], record)


def load_adapter(
    folder: str | pathlib.Path, model: transformer.Model, *, like: str | pathlib.Path
) -> transformer.Model:
    """`model`, which came from `like`, with the adapter of a peft folder; its arrays are shared.

    An adapter that holds a scalar head (`SEQ_CLS` of one label) makes the model a scorer with it.
    Raises ValueError for a setting that is not plain LoRA, for a tensor that the model has no place
    for (kernels of a fused family are none, see `save_adapter`), for one that is misshapen and for
    a damaged file.
    """
    record, file = (pathlib.Path(folder) / name for name in ADAPTER_FILES)
    if not record.is_file() or not file.is_file():
        raise ValueError(f"{folder}: holds no {' and '.join(ADAPTER_FILES)}, so it is no adapter")
    if lora.has_adapter(model):
        raise ValueError("the model has an adapter already; load this one onto its base")
    family, _ = configs.family_of(_fields_of(pathlib.Path(like)))
    settings = _read_json(record)
    with contextlib.ExitStack() as stack:
        tensors = {name: x.handle[:] for name, x in _open_file(file, stack).items()}
    return adapters.from_peft(model, family, settings, tensors, (str(record), str(file)))
