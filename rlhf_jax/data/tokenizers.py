"""Tokenizers: plain bytes, a small BPE trained here, or that of a Hugging Face folder.

All three are one record, `Tokenizer`. The ids of a folder's tokenizer are those of its
`tokenizer.json` as it stands, and equal those of transformers 4. transformers 5 builds Llama
tokenizers anew from their class instead, which loses leading spaces (its pull request 47700); on
other text its ids are the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax import storage
from rlhf_jax.data.records import Ends

PAD, EOS = "<pad>", "<eos>"

# For models without a chat template: each turn is a line with its role and then the text, and an
# answer ends with EOS.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# Around a template whose finished conversations get another end: see `Tokenizer.with_ending`.
_BEFORE, _AFTER = "{% set conversation_text %}{{ '' }}", "{{ '' }}{% endset %}"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_ANCHOR = "\n"
# Text on which tokenizers of one vocabulary differ if they split text differently.
_SAMPLE = "Two tokenizers of one vocabulary can still split 一段文字 in other places.\n\n  x = 1024"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns text into token ids and back.

    Build one with `byte_tokenizer`, `train_bpe` or `from_folder`.
    """

    vocab_size: int  # one more than the largest id
    pad_id: int  # fills rows up; never an EOS
    eos_ids: tuple[int, ...]  # every id that ends a text; the first is appended to completions
    bos_id: int | None  # what a prompt starts with; None where the tokenizer prepends nothing
    backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
    # What the folder's tokenizer_config.json says: special tokens, the chat template.
    settings: dict[str, Any] = dataclasses.field(repr=False, compare=False)

    @property
    def ends(self) -> Ends:
        """What stops a response, and what fills the row after it."""
        return Ends(self.eos_ids, self.pad_id)

    @property
    def chat_template(self) -> str | None:
        """The jinja template that renders messages (see `chat`); of several, the default one."""
        template = self.settings.get("chat_template")
        if isinstance(template, list):  # older folders: [{"name": ..., "template": ...}, ...]
            template = {one["name"]: one["template"] for one in template}
        return template.get("default") if isinstance(template, dict) else template

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of eos_token, bos_token and so on, under the names that templates use."""
        found = {name: self.settings.get(name) for name in (*_NAMED_TOKENS, "mask_token")}
        found = {k: v["content"] if isinstance(v, dict) else v for k, v in found.items()}
        return {name: text for name, text in found.items() if text is not None}

    def with_template(self, template: str) -> Tokenizer:
        """This tokenizer with another chat template, such as `PLAIN_TEMPLATE`.

        Text that spells a special token becomes that token, because that is how templates write
        EOS.
        """
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        settings = self.settings | {"chat_template": template, "split_special_tokens": False}
        return dataclasses.replace(self, backend=backend, settings=settings)

    def with_ending(self, ending: str) -> Tokenizer:
        """This tokenizer with another end of conversations that end with an answer.

        `ending` is a jinja expression, in which `conversation_text` is what the template writes of
        such a conversation. Others, and all that ask for an answer, stay as they are.
        """
        finished = "messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt"
        ending = f"{{{{ {ending} if {finished} else conversation_text }}}}"
        template = f"{_BEFORE}{_rendered_part(self.chat_template)}{_AFTER}{ending}"
        settings = self.settings | {"chat_template": template}
        return dataclasses.replace(self, settings=settings)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; nothing is prepended or appended.

        Raises ValueError for a text with half a surrogate pair, which Python allows and UTF-8 not.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # which does not say what is wrong
            text.encode()  # raises the error of UTF-8, a ValueError
            raise

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`, without special tokens and ids past the vocabulary.

        Remove padding by its mask first: where a tokenizer has no pad, rows are filled with an
        ordinary token (see `from_folder`). Tokenizers that mark a word by the space before it drop
        the space in front of the first word.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def encode_prompt(self, prompt: str) -> list[int]:
        """BOS where the tokenizer has one, then the prompt: what the sampler is fed."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(prompt)

    def encode_continuation(self, prompt: str, completion: str) -> list[int]:
        """Ids of `completion` as it follows `prompt`, so that both together spell the text.

        The policy is given the prompt's own ids, so no token may cross the boundary. Where the ids
        of the whole text start with those of the prompt, the others are the completion's. Where a
        token does cross, the completion is encoded on its own. If the tokenizer then puts a space
        in front of it that the text does not have, it is encoded after a line break instead.
        """
        head = self.encode(prompt)
        whole = self.encode(prompt + completion)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        alone = self.encode(completion)
        anchor = self.encode(_ANCHOR)
        anchored = self.encode(_ANCHOR + completion)
        if anchored[: len(anchor)] == anchor:
            text = self.decode(whole)
            if self.decode(head + alone) != text == self.decode(head + anchored[len(anchor) :]):
                return anchored[len(anchor) :]
        return alone

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `from_folder` and `transformers.AutoTokenizer` read.

        tokenizer.json, tokenizer_config.json (chat template included), and the ids of this record
        in generation_config.json, whose other entries are kept if the file is there already.
        """
        folder = storage.path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        storage.write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        # The generic class makes every version of transformers read tokenizer.json as it is. Unlike
        # the classes of language models it would also return token_type_ids, which these refuse.
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        settings = inputs | self.settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
        if (
            settings.get("pad_token")
            and _token_id(self.backend, settings, "pad_token", folder) != self.pad_id
        ):
            settings["pad_token"] = None  # `from_folder` was given another pad_id
        _write_json(folder / "tokenizer_config.json", settings)
        if (folder / "chat_template.jinja").exists():  # it would be read before the settings
            storage.write(folder / "chat_template.jinja", self.chat_template or "")
        generation = _read_json(folder / "generation_config.json")
        generation |= {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        if self.bos_id is not None:
            generation["bos_token_id"] = self.bos_id
        _write_json(folder / "generation_config.json", generation)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0 to 255, pad 256, EOS 257, no BOS. Decoding gives every text back."""
    vocab = {character: byte for byte, character in _byte_characters().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([PAD, EOS])
    return _byte_level(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on `texts`: pad 0, EOS 1, the 256 bytes, then merges within words.

    All bytes are in the vocabulary, so decoding gives every text back, not only those of the
    training. The result depends neither on the order of the texts nor on the machine. The
    vocabulary is smaller than `vocab_size` if the texts have no more pairs to merge. Raises
    ValueError below 258 entries or without texts.
    """
    if vocab_size < 258:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room for the 256 bytes, {PAD} and {EOS}; "
            "use 258 or more"
        )
    # In a fixed order, so that ties between pairs are broken alike for the same set of texts.
    texts = sorted(texts)
    if not any(texts):
        raise ValueError("there is no text to train a tokenizer on; pass at least one string")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _byte_level(backend)


def from_folder(path: str | os.PathLike, pad_id: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Ids come from tokenizer.json; a folder without one is read by `transformers.AutoTokenizer`.
    EOS ids are those of generation_config.json, or else of config.json, or else the tokenizer's
    own. BOS is the tokenizer's if it prepends one. The pad is `pad_id`, or else the tokenizer's
    own, or else that of the configurations. If that is missing or an EOS, padding is filled with
    the unknown token or the lowest id that is neither EOS nor BOS, and a warning says so.

    Raises ValueError if there is no tokenizer, no EOS, or `pad_id` is an EOS or no id at all.
    """
    folder = pathlib.Path(path)
    settings = _read_json(folder / "tokenizer_config.json")
    # Older versions of transformers keep the special tokens in a file of their own, newer ones the
    # chat template.
    settings = _read_json(folder / "special_tokens_map.json") | settings
    template = folder / "chat_template.jinja"
    if storage.is_file(template) and template.stat().st_size:
        settings["chat_template"] = template.read_text(encoding="utf-8-sig")
    _check_settings(folder, settings)
    backend = _backend(folder)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    model_settings = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")

    def configured(name: str) -> Any:
        # A model of text and images has the ids of its text in a part of its configuration.
        tower = model_settings.get("text_config")
        places = (generation, model_settings, tower if isinstance(tower, dict) else {})
        return next((x[name] for x in places if x.get(name) is not None), None)

    size = _vocab_size(backend)
    eos = configured("eos_token_id")
    eos = _token_id(backend, settings, "eos_token", folder) if eos is None else eos
    eos_ids = _eos_ids(folder, eos, size)
    bos = _token_id(backend, settings, "bos_token", folder)
    prepends = bos is not None and backend.encode("").ids[:1] == [bos]
    if pad_id is None:
        named = (_token_id(backend, settings, "pad_token", folder), configured("pad_token_id"))
        if type(named[1]) not in (int, type(None)):
            raise ValueError(f"{folder}: pad_token_id={repr(named[1])[:60]} must be an id or null")
        # Some configurations spell "none" as -1.
        usable = [i for i in named if i is not None and 0 <= i < size and i not in eos_ids]
        pad_id = usable[0] if usable else None
    if pad_id is None:
        unknown = _token_id(backend, settings, "unk_token", folder)
        pad_id = _filler(unknown, {*eos_ids, bos}, size)
        text = (
            "%s has no pad that is not an EOS: padding is filled with id %d, which no mask counts"
        )
        logging.getLogger(__name__).warning(text, folder, pad_id)
    _check_pad(folder, pad_id, eos_ids, size)
    bos_id = bos if settings.get("add_bos_token", prepends) else None
    return Tokenizer(size, pad_id, eos_ids, bos_id, backend, settings)


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has ids for which the model has no embedding."""
    largest = max(tokenizer.vocab_size - 1, *tokenizer.eos_ids, tokenizer.pad_id)
    if largest >= model_vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest} but the model's vocab_size is "
            f"{model_vocab_size}; use the model's own tokenizer or vocab_size={largest + 1}"
        )


def check_same(policy: Tokenizer, scorer: Tokenizer) -> None:
    """Raises ValueError if policy and reward model differ in ids or template, or share no EOS.

    On the device the reward model reads the policy's token ids as they are.
    """
    differ = []
    same_vocabulary = policy.backend.get_vocab() == scorer.backend.get_vocab()
    if not same_vocabulary or policy.encode(_SAMPLE) != scorer.encode(_SAMPLE):
        differ.append("ids")
    if _without_ending(policy.chat_template) != _without_ending(scorer.chat_template):
        differ.append("chat template")
    # Of several EOS ids one in common is enough, for the reward model reads whichever was sampled.
    if not set(policy.eos_ids) & set(scorer.eos_ids):
        differ.append("EOS")
    if differ:
        raise ValueError(
            f"policy and reward model differ in {' and '.join(differ)}; take a reward model of the "
            "policy's family, train one from the policy, or score texts by a function on the host"
        )


def _without_ending(template: str | None) -> str | None:
    """The template that `Tokenizer.with_ending` was given, or this one."""
    if template is None:
        return None
    if template.startswith(_BEFORE) and _AFTER in template:
        return template.removeprefix(_BEFORE).rpartition(_AFTER)[0]
    return _rendered_part(template)


def _rendered_part(template: str) -> str:
    """The template without a line break at its end, which jinja does not render."""
    return re.sub(r"(\r\n|\r|\n)\Z", "", template)


def _byte_level(backend: tokenizers.Tokenizer) -> Tokenizer:
    """A byte-level tokenizer made here. Text that spells <eos> stays text."""
    backend.decoder = decoders.ByteLevel()
    backend.encode_special_tokens = True
    settings = {
        "pad_token": PAD,
        "eos_token": EOS,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    pad, eos = backend.token_to_id(PAD), backend.token_to_id(EOS)
    return Tokenizer(_vocab_size(backend), pad, (eos,), None, backend, settings)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte, as the ByteLevel pre-tokenizer writes them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _backend(folder: pathlib.Path) -> tokenizers.Tokenizer:
    if storage.is_file(folder / "tokenizer.json"):
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8-sig")
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{folder / 'tokenizer.json'}: not a tokenizer ({error}); restore the file"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        return backend
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer here; a tokenizer folder holds tokenizer.json "
            "and tokenizer_config.json"
        )
    from transformers import AutoTokenizer

    remedy = "restore tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
    try:
        backend = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except (ValueError, OSError, TypeError, ImportError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: no tokenizer can be made of it ({why}); {remedy}") from None
    # Without a vocabulary, transformers 5 makes an empty tokenizer.
    if not backend.encode(_SAMPLE, add_special_tokens=False).ids:
        raise ValueError(f"{folder}: the vocabulary is missing; {remedy}")
    return backend


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises ValueError for special tokens or a chat template of another kind than they have."""

    def refuse(name: str, what: str) -> NoReturn:
        shown = repr(settings[name])[:60]
        raise ValueError(
            f"{folder}: {name}={shown} of tokenizer_config.json must be {what}; correct it"
        )

    for name in (*_NAMED_TOKENS, "mask_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            refuse(name, "the text of a token")
    for name in ("add_bos_token", "split_special_tokens"):
        if settings.get(name) not in (True, False, None):
            refuse(name, "true or false")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [one for one in template if isinstance(one, dict) and {"name"} <= one.keys()]
        texts = [one.get("template") for one in named] if len(named) == len(template) else [None]
    else:
        texts = list(template.values()) if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        refuse("chat_template", 'a text, or a list of {"name": ..., "template": ...}')


def _eos_ids(folder: pathlib.Path, eos: Any, size: int) -> tuple[int, ...]:
    """The ids that `eos` names: an id or a list of ids. Raises ValueError for anything else."""
    if eos is None or eos == []:
        raise ValueError(
            f"{folder}: no EOS is named; set 'eos_token_id' in generation_config.json or "
            "'eos_token' in tokenizer_config.json"
        )
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise ValueError(
            f"{folder}: eos_token_id={repr(eos)[:60]} must be an id or a list of ids, each from 0 "
            f"to the tokenizer's last, {size - 1}; correct generation_config.json or config.json"
        )
    return ids


def _check_pad(folder: pathlib.Path, pad_id: int, eos_ids: tuple[int, ...], size: int) -> None:
    if pad_id in eos_ids:
        raise ValueError(
            f"{folder}: pad_id={pad_id} is an EOS (eos_ids={eos_ids}), so padding would end "
            "texts; give another id or leave pad_id out for a filler"
        )
    if not 0 <= pad_id < size:
        raise ValueError(f"{folder}: pad_id={pad_id} is no id; use one of 0..{size - 1}")


def _filler(unknown: int | None, special: set[int | None], size: int) -> int:
    """The unknown token, or the lowest id, that is not one of the special ones."""
    candidates = itertools.chain(() if unknown is None else (unknown,), range(size))
    return next(i for i in candidates if i not in special)


def _token_id(
    backend: tokenizers.Tokenizer, settings: dict[str, Any], name: str, folder: storage.Path
) -> int | None:
    token = settings.get(name)
    if token is None:
        return None
    token = token["content"] if isinstance(token, dict) else token
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(
            f"{folder}: {name} {token!r} of tokenizer_config.json is not in the vocabulary; "
            "correct the name or add the token to tokenizer.json"
        )
    return found


def _vocab_size(backend: tokenizers.Tokenizer) -> int:
    # Ids can have gaps, so counting them is not enough.
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def _read_json(path: storage.Path) -> dict[str, Any]:
    """The object in `path`, empty where there is no such file."""
    return storage.read_json(path) if path.exists() else {}


def _write_json(path: storage.Path, value: dict[str, Any]) -> None:
    storage.write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
