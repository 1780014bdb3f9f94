"""The language model inside a model of text and images or of text and sound: its text tower.

transformers keeps such a model in a folder whose `config.json` describes the language model under
`text_config`, and whose tensors carry `language_model` in their names. Given a text alone, the
whole model computes what its tower computes, so that the tower can be read as a model of its own.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

# Architectures of which that holds, and the family of the tower where `text_config` names none. In
# others it does not: PaliGemma, for example, lets all tokens of a prompt attend to each other.
WRAPPERS = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "GotOcr2ForConditionalGeneration": "qwen2",
    "InternVLForConditionalGeneration": "qwen2",
    "LlavaForConditionalGeneration": "llama",
    "LlavaNextForConditionalGeneration": "llama",
    "LlavaNextVideoForConditionalGeneration": "llama",
    "LlavaOnevisionForConditionalGeneration": "qwen2",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen2AudioForConditionalGeneration": "qwen2",
    "VideoLlavaForConditionalGeneration": "llama",
    "VipLlavaForConditionalGeneration": "llama",
    "VoxtralForConditionalGeneration": "llama",
}
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# What transformers takes where `text_config` leaves a field of the shape out, by family.
SHAPES = {
    name: dict(zip(_SHAPE, sizes))
    for name, sizes in {
        "llama": (32000, 4096, 11008, 32, 32, None, 2048),
        "mistral": (32000, 4096, 14336, 32, 32, 8, 131072),
        "qwen2": (151936, 4096, 22016, 32, 32, 32, 32768),
        "qwen3": (151936, 4096, 22016, 32, 32, 32, 32768),
        "gemma3_text": (262208, 2304, 9216, 26, 8, 4, 131072),
    }.items()
}
# Fields beside `text_config` that are about the text too.
_SHARED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization_config",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
T = TypeVar("T")


def fields_of(fields: dict[str, Any], file: str) -> tuple[Any, dict[str, Any]] | None:
    """(family, fields) of the tower that a parsed `config.json` describes; None where it has none.

    The fields are those of the tower's own `config.json`, but for `architectures`. Raises
    ValueError, naming `file`, where `text_config` is no object.
    """
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in WRAPPERS:
        return None
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{file}: text_config={text!r:.60} must be an object for {names[0]}")
    family = text.get("model_type", WRAPPERS[names[0]])
    shape = SHAPES.get(family, {}) if isinstance(family, str) else {}
    shared = {name: fields[name] for name in _SHARED if fields.get(name) is not None}
    given = {name: x for name, x in text.items() if x is not None or name not in shape}
    return family, shape | given | shared


def tensors_of(stored: dict[str, T]) -> dict[str, T]:
    """The tensors of the tower, of all those of a folder, under the names of the tower alone.

    Both spellings are read, `language_model.model.norm.weight` and, of transformers from 4.52 on,
    `model.language_model.norm.weight`. Tensors of images and sound are left out.
    """
    head = re.compile(r"(language_model\.)?lm_head\.(?=weight$)")
    trunk = re.compile(r"(model\.)?language_model\.(model\.)?")
    named = {}
    for name, x in stored.items():
        if head.match(name):
            named["lm_head.weight"] = x
        elif trunk.match(name):
            named[trunk.sub("model.", name, count=1)] = x
    return named
