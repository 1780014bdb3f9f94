"""The model families of transformers: how each names its options and stores its tensors.

A family is a table and has no code of its own. Reading a folder and writing one use the same table.
In this folder a *path* is the place of an array in a `Model` ("layer_3/mlp/up/kernel"), and a
*stored* name or tensor is one of transformers' files ("model.layers.3.mlp.up_proj.weight").
"""

from __future__ import annotations

import re
import typing
from typing import Any, NamedTuple

import numpy as np


class Family(NamedTuple):
    """How one family writes its configurations and tensors.

    Where `modules` maps several modules of a `Model` to one stored module, the stored tensor holds
    them joined, in the order of the table.
    """

    model_type: str  # the field of that name
    causal: str  # the architecture of its language models
    classifier: str  # the architecture of its classifiers, which are read as reward models
    modules: dict[str, str]  # module of a Model -> stored module; "layer": prefix of a layer's
    fields: dict[str, str]  # option of transformer.Config -> field of config.json
    defaults: dict[str, Any] = {}  # values of fields that config.json leaves out
    fixed: dict[str, Any] = {}  # options that all models of the family share
    plain: dict[str, tuple] = {}  # fields of unsupported features -> values that switch them off
    # The layers without a window, from the fields; used where layer_types does not say.
    full_layers: typing.Callable[[dict], range] | None = None
    rope_base: str = "rope_theta"  # the field that holds the rope base
    rotary_share: str | None = None  # the field that says which share of a head is rotated
    conv1d: bool = False  # kernels of layers are stored [in, out], as in a Model, not [out, in]
    by_head: bool = False  # query, key and value are joined for each head, not one after another
    ignored: str = r".*\.rotary_emb\.inv_freq"  # buffers that old checkpoints stored


_MODULES = {
    "embed": "model.embed_tokens",
    "layer": "model.layers.{layer}.",
    "norm": "model.norm",
    "head": "lm_head",
    "score": "score",
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_QK_NORM = {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}
_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "d_ff": "intermediate_size",
    "tied": "tie_word_embeddings",
}
_GROUPED = _FIELDS | {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
}
_ALL_BIASES = {name: "attention_bias" for name in ("qkv_bias", "out_bias")}
_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
_GEMMA = {"norm": "rms_plus_one", "embed_scale": True}
_GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "head_dim": 256,
}
_GEMMA_FIELDS = (
    _GROUPED
    | _ALL_BIASES
    | {
        "activation": "hidden_activation",
        "query_scalar": "query_pre_attn_scalar",
        "window": "sliding_window",
        "logit_softcap": "final_logit_softcapping",
    }
)
_CAUSAL_ONLY = {"use_bidirectional_attention": (False, None)}
_LAYERED = {"norm": "layer", "gated": False, "mlp_bias": True}
_BIASED = {"qkv_bias": True, "out_bias": True}
_QWEN_DEFAULTS = _DEFAULTS | {"sliding_window": 4096}


def _every_second(fields: dict) -> range:
    """Every second layer, which is fixed in Gemma 2."""
    return range(1, fields["num_hidden_layers"], 2)


def _last_of_pattern(fields: dict) -> range:
    """The last of every `sliding_window_pattern` layers, as in Gemma 3."""
    step = fields.get("sliding_window_pattern") or 6
    return range(step - 1, fields["num_hidden_layers"], step)


def _none(fields: dict) -> range:
    """No layer: all layers have the window."""
    return range(0)


def before_max_window(fields: dict) -> range:
    """The layers before `max_window_layers`, as in Qwen."""
    return range(min(fields.get("max_window_layers", 28), fields["num_hidden_layers"]))


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    _MODULES,
    _GROUPED | {"window": "sliding_window"},
    _DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8},
)
MINISTRAL = MISTRAL._replace(
    model_type="ministral",
    causal="MinistralForCausalLM",
    classifier="MinistralForSequenceClassification",
    full_layers=_none,
)
FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        _MODULES,
        _GROUPED | _ALL_BIASES | {"mlp_bias": "mlp_bias"},
        _DEFAULTS,
        plain={"sliding_window": (None,)},
    ),
    MISTRAL,
    MINISTRAL,
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        _MODULES,
        _GROUPED | {"window": "sliding_window"},
        _QWEN_DEFAULTS,
        {"qkv_bias": True},
        full_layers=before_max_window,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        _MODULES | _QK_NORM,
        _GROUPED | _ALL_BIASES | {"window": "sliding_window"},
        _QWEN_DEFAULTS | {"head_dim": 128},
        {"qk_norm": True},
        full_layers=before_max_window,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        {
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "layer": "transformer.h.{layer}.",
            "norm": "transformer.ln_f",
            "head": "lm_head",
            "score": "score",
            "attention_norm": "ln_1",
            "attention/query": "attn.c_attn",
            "attention/key": "attn.c_attn",
            "attention/value": "attn.c_attn",
            "attention/out": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp/up": "mlp.c_fc",
            "mlp/down": "mlp.c_proj",
        },
        {
            "vocab_size": "vocab_size",
            "num_layers": "n_layer",
            "d_model": "n_embd",
            "num_heads": "n_head",
            "max_length": "n_positions",
            "d_ff": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tied": "tie_word_embeddings",
        },
        {
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "n_positions": 1024,
        },
        _LAYERED | _BIASED | {"positions": "learned"},
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        conv1d=True,
        ignored=r".*\.attn\.(masked_)?bias",
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        "GemmaForSequenceClassification",
        _MODULES,
        _GROUPED | _ALL_BIASES,
        _GEMMA_DEFAULTS,
        _GEMMA,
        _CAUSAL_ONLY,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        _MODULES | _POST_NORMS,
        _GEMMA_FIELDS | {"attention_softcap": "attn_logit_softcapping"},
        _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _GEMMA | {"post_norms": True},
        _CAUSAL_ONLY,
        full_layers=_every_second,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        _MODULES | _POST_NORMS | _QK_NORM,
        _GEMMA_FIELDS,
        _GEMMA_DEFAULTS | {"rope_theta": 1e6},
        _GEMMA | {"post_norms": True, "qk_norm": True},
        _CAUSAL_ONLY | {"attn_logit_softcapping": (None,)},
        full_layers=_last_of_pattern,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "Phi3ForSequenceClassification",
        _MODULES
        | {f"attention/{name}": "self_attn.qkv_proj" for name in ("query", "key", "value")}
        | {f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
        _GROUPED | {"window": "sliding_window"},
        _DEFAULTS | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        rotary_share="partial_rotary_factor",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        {
            "embed": "gpt_neox.embed_in",
            "layer": "gpt_neox.layers.{layer}.",
            "norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
            "score": "score",
            "attention_norm": "input_layernorm",
            "attention/query": "attention.query_key_value",
            "attention/key": "attention.query_key_value",
            "attention/value": "attention.query_key_value",
            "attention/out": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "mlp/up": "mlp.dense_h_to_4h",
            "mlp/down": "mlp.dense_4h_to_h",
        },
        _FIELDS
        | _ALL_BIASES
        | {
            "norm_eps": "layer_norm_eps",
            "activation": "hidden_act",
            "parallel": "use_parallel_residual",
        },
        {
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
        },
        _LAYERED,
        rope_base="rotary_emb_base",
        rotary_share="rotary_pct",
        by_head=True,
        ignored=r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        "OPTForSequenceClassification",
        {
            "embed": "model.decoder.embed_tokens",
            "positions": "model.decoder.embed_positions",
            "layer": "model.decoder.layers.{layer}.",
            "norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
            "score": "score",
            "attention_norm": "self_attn_layer_norm",
            "attention/query": "self_attn.q_proj",
            "attention/key": "self_attn.k_proj",
            "attention/value": "self_attn.v_proj",
            "attention/out": "self_attn.out_proj",
            "mlp_norm": "final_layer_norm",
            "mlp/up": "fc1",
            "mlp/down": "fc2",
        },
        _FIELDS | {"d_ff": "ffn_dim", "activation": "activation_function"},
        {"activation_function": "relu", "tie_word_embeddings": True},
        _LAYERED | _BIASED | {"positions": "learned", "position_offset": 2, "norm_eps": 1e-5},
        {
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
        },
    ),
)

# --- tensors --------------------------------------------------------------------------------------


def _module(path: str) -> str:
    """The key of `Family.modules` for the array at a path."""
    if path == "embed/positions":
        return "positions"
    return re.sub(r"^layer_\d+/", "", path).rpartition("/")[0]


def stored_name(family: Family, path: str) -> str:
    """The stored name: "layer_3/mlp/up/kernel" -> "model.layers.3.mlp.up_proj.weight"."""
    layer = re.match(r"layer_(\d+)/", path)
    prefix = family.modules["layer"].format(layer=layer[1]) if layer else ""
    kind = ".bias" if path.endswith("/bias") else ".weight"
    return prefix + family.modules[_module(path)] + kind


def groups(family: Family, paths: list[str]) -> dict[str, list[str]]:
    """Stored name -> paths of the arrays that its tensor holds, in the tensor's order.

    The bias of the scalar head is left out: classifiers of transformers have none.
    """
    order = list(family.modules)
    found: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda x: order.index(_module(x))):
        if path != "score/bias":
            found.setdefault(stored_name(family, path), []).append(path)
    return found


def is_transposed(family: Family, path: str) -> bool:
    """Whether an array is stored transposed: kernels are [in, out] in a `Model`, and stored as
    [out, in] except in the layers of GPT-2."""
    return path.endswith("/kernel") and not (family.conv1d and path.startswith("layer_"))


def stored_shape(family: Family, paths: list[str], shapes: list[tuple[int, ...]]) -> tuple:
    """The shape of the stored tensor that holds the arrays at `paths`, whose shapes are given."""
    rest, out = shapes[0][:-1], sum(shape[-1] for shape in shapes)
    return (out, *rest) if is_transposed(family, paths[0]) else (*rest, out)


def split(
    family: Family, paths: list[str], widths: list[int], num_heads: int, tensor: np.ndarray
) -> list[np.ndarray]:
    """The arrays at `paths` from the stored tensor; `widths` are the sizes of their last axes."""
    transposed = is_transposed(family, paths[0])
    if len(paths) == 1:
        parts = [tensor]
    elif family.by_head:
        by_head = tensor.reshape(num_heads, len(paths), -1, *tensor.shape[1:])
        parts = [by_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(len(paths))]
    else:
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=0 if transposed else -1)
    return [part.T for part in parts] if transposed else parts


def join(family: Family, paths: list[str], num_heads: int, parts: list[np.ndarray]) -> np.ndarray:
    """The stored tensor from the arrays at `paths`: the inverse of `split`."""
    transposed = is_transposed(family, paths[0])
    parts = [part.T for part in parts] if transposed else parts
    if len(paths) == 1:
        return parts[0]
    if family.by_head:
        rest = parts[0].shape[1:]
        by_head = [part.reshape(num_heads, 1, -1, *rest) for part in parts]
        return np.concatenate(by_head, axis=1).reshape(-1, *rest)
    return np.concatenate(parts, axis=0 if transposed else -1)
