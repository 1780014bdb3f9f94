"""What experiments on the user's own files share: their settings, and how files are read."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import jax

from rlhf_jax import config as configuration
from rlhf_jax.config import Count, Positive, Share, Source, Whole
from rlhf_jax.data import builders, formats, mixing, tokenizers
from rlhf_jax.data.batches import Examples
from rlhf_jax.data.records import Ends
from rlhf_jax.data.schema import BadRow, Example, shown
from rlhf_jax.launch import Context
from rlhf_jax.models import lora, transformer
from rlhf_jax.models.transformer import Compute, Model

# Qwen2.5 of half a billion parameters.
QWEN = transformer.Config(
    vocab_size=151936,
    num_layers=24,
    d_model=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    d_ff=4864,
    max_length=32768,
    rope_base=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    tied=True,
)
# Ids of a tokenizer are constants of a program, which change neither its size nor its work.
ENDS = Ends(eos_ids=(1,), pad_id=0)


class Common(configuration.Config):
    """What every experiment on the user's own files is told. "" is not given; lengths in tokens."""

    seed: Whole = 0  # of every stage; a stage's own seed is folded into it
    model: Source = ""  # folder or org/name of a language model
    preferences: Source = ""  # file of comparisons
    # Where the fields fit several formats, or none: the name of one, "en:de" (source:target), or a
    # map of fields, such as prompt=question,chosen=good,rejected=bad (docs/formats.md).
    preferences_format: str = ""
    held_out: Share = 0.1  # share of the prompts that nothing is trained on
    max_prompt: Count = 128  # what is longer is dropped and counted
    max_response: Count = 128  # EOS included
    plain_template: bool = False  # use a plain chat template if the tokenizer has none
    # Feed plain prompts without the chat template. Not for alpaca rows, which are read as chats.
    raw_prompts: bool = False
    on_bad_row: Literal["error", "drop"] = "error"  # what to do with an unusable row
    lora_rank: Whole = 0  # of adapters; 0 trains all weights
    lora_alpha: Positive = 16.0  # an adapter's scale is alpha / rank
    # What `--plan` compiles where no model is named. What it says of `dtype`, `remat` and
    # `scan_layers`, which no folder states, holds for the models that are trained too.
    shape: transformer.Config = QWEN
    num_shown: Count = 4  # prompts in the table of samples

    def check(self) -> None:
        """Raises ValueError for a format that no file has."""
        for name, value in vars(self).items():
            file = name.removesuffix("_format")
            if value and file != name and not vars(self)[file]:
                raise ValueError(
                    f"--{_flag(name)} {shown(value)} is of no file: --{_flag(file)} names none; "
                    "name one, or leave the format out"
                )


def _flag(name: str) -> str:
    return name.replace("_", "-")


def open_tokenizer(folder: pathlib.Path, plain_template: bool) -> tokenizers.Tokenizer:
    """The folder's tokenizer, with the plain chat template if it has none and one is asked for."""
    tokenizer = tokenizers.from_folder(folder)
    if plain_template and tokenizer.chat_template is None:
        return tokenizer.with_template(tokenizers.PLAIN_TEMPLATE)
    return tokenizer


def compute_of(config: Common, context: Context) -> Compute:
    """How models are computed: as the command line says, or else as `config.shape` does."""
    shape = context.compute.of(config.shape)
    return Compute(shape.dtype, shape.remat, shape.scan_layers)


def adapted(config: Common, policy: Model) -> Model:
    """The model with an adapter, where one is asked for."""
    if not config.lora_rank:
        return policy
    adapter = lora.Config(rank=config.lora_rank, alpha=config.lora_alpha)
    return lora.attach(policy, adapter, jax.random.key(config.seed))


class File(NamedTuple):
    """The rows of a file with their line numbers, split by prompt, and their format."""

    name: str  # of the setting
    path: str
    rows: list
    held_out: list
    format: formats.FormatLike
    kinds: set[str]  # of its prompts: "messages", "text", or "none" for text without a prompt


def open_file(config: Common, name: str, parse: Callable[..., Example]) -> File | None:
    """The file that a setting names, None where it names none.

    `parse` is the function of `formats` for what is to be read from its rows. Raises ValueError for
    rows that cannot be read, and if one part of the split would be empty.
    """
    path = vars(config)[name]
    if not path:
        return None
    with naming_flags(config, name):
        source, format = formats.located(path, vars(config)[f"{name}_format"])
        found = builders.load(source, on_bad_row=config.on_bad_row)
        _check_format(path, found, parse, format)
        rows, held_out = mixing.split(found, config.held_out, format=format)
        kinds, faulty = set(), []
        for row, where in rows:
            try:
                prompt = formats.either(row, format).prompt
                kinds.add("messages" if isinstance(prompt, tuple) else "text" if prompt else "none")
            except BadRow as error:
                faulty.append(f"{where}: {error}")
        if faulty and config.on_bad_row == "error":
            raise BadRow(faulty[0])
    usable = len(rows) - len(faulty)
    if not usable or not held_out:
        why = (
            f"; {len(faulty)} faulty rows were dropped, the first one {faulty[0]}" if faulty else ""
        )
        raise ValueError(
            f"{path}: {usable} rows to train on and {len(held_out)} held out{why}; give more "
            f"usable rows or another --held-out than {config.held_out}"
        )
    return File(name, path, rows, held_out, format, kinds)


# A map of fields for each thing that can be read from a row.
_MAPS = {
    formats.demonstration: "prompt=FIELD,completion=FIELD",
    formats.comparison: "prompt=FIELD,chosen=FIELD,rejected=FIELD",
    formats.prompt: "prompt=FIELD",
}


def _check_format(path: str, rows: Iterable, parse: Callable, format: formats.FormatLike) -> None:
    """Raises ValueError if no row can be read: the format is at fault then, and not the rows."""
    faults, first = collections.Counter(), {}
    for row, where in formats.numbered(rows):
        try:
            parse(row, format)
            return
        except BadRow as error:
            if not isinstance(row, str):  # a text is a line that is no row
                faults[str(error)] += 1
                first.setdefault(str(error), where)
    if faults:
        fault, _ = faults.most_common(1)[0]
        raise ValueError(
            f"{path}: none of its {faults.total()} rows can be read as a {parse.__name__}: "
            f"{first[fault]}: {fault}; say what its fields are by format=, such as {_MAPS[parse]} "
            "(docs/formats.md)"
        )


@contextlib.contextmanager
def naming_flags(config: Common, name: str) -> Iterator[None]:
    """Errors of a file then name the flags that help, in place of arguments in Python."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bformat=(?=['\"])", f"--{_flag(name)}-format=", str(error))
        text = re.sub(r"\bformat=(?=[,; ]|$)", f"--{_flag(name)}-format", text)
        if isinstance(error, BadRow) and config.on_bad_row == "error":
            text += "; or leave such rows out by --on-bad-row drop"
        raise ValueError(text) from error


def check_prompts(
    config: Common, template: bool, demonstrations: File | None, others: list[File]
) -> None:
    """Raises ValueError if prompts of different files would be formatted differently.

    `template`: whether the tokenizer has a chat template.
    """
    chats = [file for file in (demonstrations, *others) if file and "messages" in file.kinds]
    if chats and not template:
        raise ValueError(
            f"{chats[0].path}: its rows are read as messages, but the tokenizer has no chat "
            "template; take the model and tokenizer of a chat model, or --plain-template"
        )
    if chats and config.raw_prompts:
        raise ValueError(
            f"{chats[0].path}: its rows are read as messages, which raw prompts of other files "
            "would not look like; leave --raw-prompts out"
        )
    plain = demonstrations and others and not chats and "none" in demonstrations.kinds
    if plain and template and not config.raw_prompts:
        raise ValueError(
            f"{demonstrations.path}: its texts have no prompts, so they teach nothing about the "
            "chat template that prompts would go through; feed those as they stand by --raw-prompts"
        )


def tokenised(
    config: Common,
    tokenizer: tokenizers.Tokenizer,
    tokenize: Callable[..., Examples],
    file: File,
    rows: list,
    *sizes: int,
    parse: Callable = formats.read,
) -> Examples:
    """Rows of a file as examples. Where the tokenizer has a chat template, prompts go through it.

    `tokenize` is a function of `batches` and `sizes` are its limits.
    """
    format = file.format
    if tokenizer.chat_template is not None and not config.raw_prompts:
        format = formats.as_messages(format, parse)
    with naming_flags(config, file.name):
        return tokenize(rows, tokenizer, *sizes, format=format, on_bad_row=config.on_bad_row)
