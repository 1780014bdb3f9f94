"""The `config.json` of transformers as a `transformer.Config`, and back."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from typing import Any

from rlhf_jax.models import rope, transformer
from rlhf_jax.models.huggingface import families, towers

ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
# Architectures and types of models that are mixtures of experts, and fields that count experts.
MIXTURES = re.compile(
    r"MoE|Moe|moe|Mixtral|mixtral|Dbrx|dbrx|Deepseek|deepseek|GptOss|gpt_oss|Jamba|jamba|Llama4"
    r"|llama4|Grok|grok|Arctic|arctic|Ernie4_5_"
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
LAYER_TYPES = ("sliding_attention", "full_attention")
WRITTEN_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def family_of(fields: dict[str, Any], file: str = "config.json") -> tuple[families.Family, bool]:
    """The family that `architectures` names, and whether it names the family's classifier.

    Raises ValueError, naming `file`, for any other architecture.
    """
    names = fields.get("architectures")
    known = ", ".join(x for one in families.FAMILIES for x in (one.causal, one.classifier))
    experts = _experts(fields)
    if experts:
        raise ValueError(
            f"{file}: architectures={names} is not supported (a mixture of experts, none of which "
            f"is built: {experts}); these are: {known}"
        )
    for family in families.FAMILIES:
        if names in ([family.causal], [family.classifier]):
            # As in transformers' auto classes a Mistral with layer_types is a Ministral.
            ministral = family is families.MISTRAL and "layer_types" in fields
            return families.MINISTRAL if ministral else family, names == [family.classifier]
    raise ValueError(
        f"{file}: architectures={names} is not supported; these are: {known}; and of a model of "
        f"text and images or sound, to be trained without an adapter: {', '.join(towers.WRAPPERS)}"
    )


def _experts(fields):
    """Which field says that the model, or its text tower, is a mixture of experts; "" if none."""
    text = fields.get("text_config")
    for part in (fields, text if isinstance(text, dict) else {}):
        names = part.get("architectures")
        names = names if isinstance(names, list) else []
        for name, value in [("model_type", part.get("model_type"))] + [
            ("architectures", name) for name in names
        ]:
            if isinstance(value, str) and MIXTURES.search(value):
                return f"{name}={value!r}"
        for name in EXPERTS:
            if part.get(name) not in (None, 0, False):
                return f"{name}={part[name]!r:.60}"
    return ""


def text_fields(fields: dict[str, Any], file: str = "config.json") -> dict[str, Any]:
    """The fields of the language model that a parsed `config.json` describes.

    These are the fields themselves, or those of the text tower of a model that is more than a
    language model (see `towers`). Raises ValueError, naming `file`, for a tower that is not built.
    """
    experts, tower = _experts(fields), towers.fields_of(fields, file)
    if tower is None or experts:
        return fields  # `family_of` says what is wrong with it
    name, text = tower
    for family in families.FAMILIES:
        if family.model_type == name:
            return text | {"architectures": [family.causal], "model_type": name}
    built = ", ".join(family.model_type for family in families.FAMILIES)
    raise ValueError(
        f"{file}: text_config.model_type={name!r} is not supported; these are: {built}"
    )


def config_from(
    fields: dict[str, Any], file: str = "config.json", dtype: str = "float32"
) -> transformer.Config:
    """The configuration that the fields of a parsed `config.json` describe.

    Both spellings are read: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of
    transformers 5. An absent field has the family's default in transformers. The file's own
    `torch_dtype` or `dtype` is not read, because each tensor states its own type; the argument
    `dtype` is the type in which products are computed.
    Raises ValueError, naming `file` and the field, for a setting that is not supported.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: products are computed in 'float32' or 'bfloat16'")
    fields = text_fields(fields, file)
    family, classifier = family_of(fields, file)
    _refuse(family, fields, classifier, file)
    hints = typing.get_type_hints(transformer.Config)
    values = dict(family.fixed)
    for option, field in family.fields.items():
        values[option] = _value(hints[option], fields, field, family.defaults, file)
    heads, width = values["num_heads"], values["d_model"]
    values["num_kv_heads"] = values.get("num_kv_heads") or heads
    values["head_dim"] = values.get("head_dim") or width // heads
    values["d_ff"] = values["d_ff"] or 4 * width
    if heads % values["num_kv_heads"]:
        raise ValueError(
            f"{file}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={values['num_kv_heads']}"
        )
    if values.get("positions") != "learned":
        values |= _rope(family, fields, values, file)
    values |= _window(family, fields, values, file)
    return transformer.Config(**values, dtype=dtype)


def _refuse(family, fields, classifier, file):
    """Raises ValueError for settings that change the model in a way that is not supported."""
    for name, values in (family.plain | {"quantization_config": (None,)}).items():
        if name in fields and fields[name] not in values:
            raise ValueError(
                f"{file}: {name}={fields[name]!r} is not supported; only {values[0]!r} is"
            )
    projected = fields.get("word_embed_proj_dim")
    if family.model_type == "opt" and projected not in (None, fields.get("hidden_size")):
        raise ValueError(
            f"{file}: word_embed_proj_dim={projected!r} is not supported; only hidden_size is"
        )
    named = fields.get("id2label")
    if not isinstance(named, dict | None):
        raise ValueError(f"{file}: id2label={named!r} must be an object or null")
    labels = fields.get("num_labels", len(named) if named else 2)  # transformers' default is two
    if classifier and labels != 1:
        raise ValueError(
            f"{file}: a classifier of num_labels={labels} is not supported; only 1, a score, is"
        )


def _value(hint, fields, name, defaults, file):
    """The value of a field, for an option of type `hint`.

    An absent field has its default. So has a null field, unless null switches the option off.
    """
    if hint == int | None or hint == float | None:
        value = fields.get(name, defaults.get(name))
        if value is None:
            return None
        return (whole if hint == int | None else real)(name, value, file)
    value = fields.get(name)
    value = defaults.get(name) if value is None else value
    if hint is bool:
        if value not in (True, False, None):
            raise ValueError(f"{file}: {name}={value!r} must be true or false")
        return bool(value)
    if hint is float:
        return real(name, value, file)
    if hint is int and name in ("num_key_value_heads", "head_dim", "n_inner"):
        value = fields.get(name, defaults.get(name))  # null: it follows from other fields
        return value if value is None else whole(name, value, file)
    if hint is int:
        if value is None:
            raise ValueError(f"{file}: {name} is missing; is this a language model's config.json?")
        return whole(name, value, file)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"{file}: {name}={value!r} is not supported; these are: {', '.join(ACTIVATIONS)}"
        )
    # The files of Gemma 1 say "gelu" and mean its tanh approximation, as in transformers. In later
    # Gemmas, whose field is hidden_activation, "gelu" is the exact function.
    legacy = (name, value) == ("hidden_act", "gelu") and defaults.get(name) == "gelu_pytorch_tanh"
    return "gelu_tanh" if legacy else ACTIVATIONS[value]


def whole(name: str, value: Any, file: str) -> int:
    """`value`, or a ValueError unless it is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {name}={value!r} must be a whole number of at least 1")
    return value


def real(name: str, value: Any, file: str) -> float:
    """`value` as a float, or a ValueError unless it is a positive number."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {name}={value!r} must be a positive number")
    return float(value)


def _window(family, fields, values, file):
    """The options `window` and `full_layers`; the window is None where no layer has one."""
    window, depth = values.get("window"), values["num_layers"]
    if family.model_type in ("qwen2", "qwen3") and not fields.get("use_sliding_window", False):
        window = None
    if window is None:
        return {"window": None, "local_rope_base": None}
    types = fields.get("layer_types") if family.full_layers else None
    if types is None:
        full = tuple(family.full_layers(fields)) if family.full_layers else ()
    elif isinstance(types, list) and len(types) == depth and all(x in LAYER_TYPES for x in types):
        full = tuple(i for i in range(depth) if types[i] == "full_attention")
    else:
        raise ValueError(
            f"{file}: layer_types must name full_attention or sliding_attention for each of the "
            f"{depth} layers"
        )
    if len(full) == depth:
        return {"window": None, "local_rope_base": None}
    return {"full_layers": full}


def _rope_fields(family, fields, file):
    """(rotary fields, those of Gemma 3's windowed layers, the name of the first in the file).

    The precedence is that of transformers 5: `rope_scaling` replaces all of `rope_parameters`, its
    rope_theta included, except in Gemma 3, where it only replaces single fields of the
    `full_attention` part of `rope_parameters`.
    """
    scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters")
    name, local = "rope_scaling" if scaling else "rope_parameters", None
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(value, dict | None):
            raise ValueError(f"{file}: {key}={value!r} must be an object or null")
    if family.model_type == "gemma3_text":
        local, full = ((parameters or {}).get(x) for x in LAYER_TYPES)
        if not isinstance(local, dict | None) or not isinstance(full, dict | None):
            raise ValueError(f"{file}: rope_parameters must hold an object or null for each kind")
        scaling = (full or {"rope_type": "default"}) | (scaling or {})
    return scaling or parameters or {}, local or {}, name


def _rope(family, fields, values, file):
    """The options of rotary positions, from either spelling."""
    found = {}
    given, local, name = _rope_fields(family, fields, file)
    if family.model_type == "gemma3_text":
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"{file}: rope_parameters.sliding_attention is scaled, which is not supported"
            )
        base = local.get("rope_theta", fields.get("rope_local_base_freq", 1e4))
        found["local_rope_base"] = real("rope_local_base_freq", base, file)
    base = fields.get(family.rope_base, family.defaults.get(family.rope_base, 1e4))
    found["rope_base"] = real(family.rope_base, given.get("rope_theta", base), file)
    key = family.rotary_share or "partial_rotary_factor"
    share = given.get("partial_rotary_factor", fields.get(key, family.defaults.get(key)))
    share = 1.0 if share is None else real(key, share, file)
    if share != 1 and (family.rotary_share is None or share > 1):
        where = f"{name} has " if "partial_rotary_factor" in given else ""
        raise ValueError(f"{file}: {where}{key}={share}, which is not supported; only 1 is")
    size = int(values["head_dim"] * share)
    if size % 2 or not size:
        what = f"head_dim={size}" if share == 1 else f"{key}={share} of {values['head_dim']}"
        raise ValueError(f"{file}: {what} is odd; rotary positions need pairs")
    found["rotary_dim"] = None if size == values["head_dim"] else size
    return found | {"rope_scaling": _scaling(family, fields, given, name, size, values, file)}


def _scaling(family, fields, given, name, size, values, file):
    """The `rope.Scaling` of the rotary fields `given`, which stand under `name` in the file."""
    kind = given.get("rope_type", given.get("type", "default"))  # "type": transformers before 4.43
    if family.model_type == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # its name in the first files of Phi-3
    kinds = typing.get_args(rope.Kind)
    if kind not in kinds:
        raise ValueError(
            f"{file}: {name} has rope_type={kind!r}, which is not supported; "
            f"these are: {', '.join(kinds)}"
        )
    if kind == "default":
        return rope.Scaling()

    def number(key):
        return real(f"{name}.{key}", given.get(key), file)

    if kind == "linear":
        return rope.Scaling(kind=kind, factor=number("factor"))
    max_length, key = values["max_length"], "original_max_position_embeddings"
    if kind == "dynamic":
        return rope.Scaling(kind=kind, factor=number("factor"), original_length=max_length)
    original = fields.get(key) or given.get(key) or family.defaults.get(key, max_length)
    found = {"kind": kind, "original_length": whole(key, original, file)}
    if kind == "llama3" or given.get("factor") is not None:
        found["factor"] = number("factor")
    else:
        found["factor"] = max_length / original
    if kind == "llama3":
        return rope.Scaling(
            **found,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    if given.get("attention_factor") is not None:
        found["attention_factor"] = number("attention_factor")
    if kind == "yarn":
        return _yarn(found, given, number)
    for option, field in (("short_factors", "short_factor"), ("long_factors", "long_factor")):
        numbers = given.get(field)
        if not isinstance(numbers, list) or len(numbers) != size // 2:
            raise ValueError(f"{file}: {name}.{field} must be a list of {size // 2} numbers")
        found[option] = tuple(real(f"{name}.{field}", x, file) for x in numbers)
    return rope.Scaling(**found)


def _yarn(found, given, number):
    """YaRN's scaling; `number(key)` reads a positive number from the rotary fields `given`."""
    if "attention_factor" not in found and given.get("mscale") and given.get("mscale_all_dim"):
        factors = [
            0.1 * number(x) * math.log(max(found["factor"], 1)) + 1
            for x in ("mscale", "mscale_all_dim")
        ]
        found["attention_factor"] = factors[0] / factors[1]
    for key in ("beta_fast", "beta_slow"):
        if given.get(key):
            found[key] = number(key)
    return rope.Scaling(**found, truncate=given.get("truncate") is not False)


def fields_from(config: transformer.Config, classifier: bool = False) -> dict[str, Any]:
    """The fields of a `config.json` for a model that was made here.

    The family is the first that has all of the model's options, in the spelling of transformers 4,
    which transformers 5 reads too. Raises ValueError if no family has them all.
    """
    wanted = transformer.as_stored(config)
    for family in families.FAMILIES:
        fixed = {"positions": "rotary"} | family.fixed
        rotates = family.rotary_share or config.rotary_dim is None
        if rotates and all(vars(config)[name] == value for name, value in fixed.items()):
            fields = _fields(family, config, classifier)
            found = config_from(fields)
            if config.query_scalar is None and found.query_scalar == config.head_dim:
                found = dataclasses.replace(found, query_scalar=None)  # these are one and the same
            if found == wanted:
                return fields
    raise ValueError(
        "no family of transformers has this model's options, so no config.json can describe it; "
        f"they are: {wanted}"
    )


def _fields(family, config, classifier):
    """The fields of the configuration in one family, which may have no field for an option."""
    fields = {
        "architectures": [family.classifier if classifier else family.causal],
        "model_type": family.model_type,
        **(ONE_LABEL if classifier else {}),
    }
    for option, field in family.fields.items():
        value = vars(config)[option]
        fields[field] = WRITTEN_ACTIVATIONS[value] if option == "activation" else value
        if option == "query_scalar":  # Gemma must say it
            fields[field] = value or config.head_dim
    switched = family.full_layers is families.before_max_window  # Qwen's window is off by default
    if family.full_layers and (config.window is not None or not switched):
        full = [config.window is None or i in config.full_layers for i in range(config.num_layers)]
        fields["layer_types"] = [LAYER_TYPES[x] for x in full]
        if switched:
            fields["use_sliding_window"] = True
        if config.window is None:  # no layer has it, but transformers makes its mask all the same
            fields["sliding_window"] = family.defaults["sliding_window"]
    if config.positions == "learned":
        return fields
    fields[family.rope_base] = config.rope_base
    if family.model_type == "gemma3_text":
        fields["rope_local_base_freq"] = config.local_rope_base or config.rope_base
    if family.rotary_share:
        fields[family.rotary_share] = (config.rotary_dim or config.head_dim) / config.head_dim
    scaling, original = config.rope_scaling, "original_max_position_embeddings"
    if scaling.kind == "default":
        return fields
    given: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        given[original] = scaling.original_length
    if scaling.kind == "llama3":
        given |= {x: vars(scaling)[x] for x in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind == "yarn":
        given |= {x: vars(scaling)[x] for x in ("beta_fast", "beta_slow", "truncate")}
    if scaling.attention_factor is not None:
        given["attention_factor"] = scaling.attention_factor
    if scaling.kind == "longrope":
        given |= {"short_factor": [*scaling.short_factors], "long_factor": [*scaling.long_factors]}
        fields[original] = scaling.original_length  # where transformers 4 looks for it
        if family.model_type == "phi3":  # its files have these three fields only
            given = {"type": "longrope"} | {x: given[x] for x in ("short_factor", "long_factor")}
    return fields | {"rope_scaling": given}
