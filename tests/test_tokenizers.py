"""rlhf_jax.data.tokenizers: ids, special tokens and the boundary between prompt and completion."""

import dataclasses
import gzip
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.data import tokenizers
from rlhf_jax.data.tokenizers import byte_tokenizer, check_vocab, from_folder, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve café — 猫が好き 🐈\n\ttabs"]
ODD = "zß水🍌 <eos> <pad> \r\n\x00 مرحبا  two  spaces "


def folder_of(tmp_path: pathlib.Path, **files: dict) -> pathlib.Path:
    """A Hugging Face folder with the byte tokenizer's ids and the given settings files."""
    byte_tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_byte_ids_are_the_utf8_bytes():
    tokenizer = byte_tokenizer()
    for text in [*TEXTS, ODD, "", "".join(map(chr, range(256)))]:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    facts = tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_ids, tokenizer.bos_id
    assert facts == (258, 256, (257,), None)


def test_decoding_skips_special_tokens_and_ids_past_the_vocabulary():
    tokenizer = byte_tokenizer()
    ids = np.array([72, 256, 105, 257, 300], np.int32)
    assert tokenizer.decode(ids) == "Hi"


def test_half_a_character_decodes_to_the_replacement_sign_as_python_does():
    tokenizer = byte_tokenizer()
    half = list("é".encode())[:1]
    assert tokenizer.decode(half) == bytes(half).decode(errors="replace")


def test_bpe_is_lossless_on_its_training_text_and_on_every_other():
    tokenizer = train_bpe(TEXTS, 300)
    for text in [*TEXTS, ODD, ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_merges_the_most_frequent_pair_first():
    # "ab" occurs 4 times, "bc" 3 times, "cd" once: the first merge (id 258) is "ab".
    tokenizer = train_bpe(["ab ab abc bc bc cd"], 260)
    assert tokenizer.encode("ab")[0] == 258
    assert tokenizer.backend.id_to_token(258) == "ab"


def test_bpe_does_not_depend_on_the_order_of_the_texts_or_on_the_run():
    first, second = train_bpe(TEXTS, 320), train_bpe(TEXTS[::-1], 320)
    assert first.backend.to_str() == second.backend.to_str()


def test_bpe_compresses_and_keeps_within_its_size():
    tokenizer = train_bpe(TEXTS, 290)
    assert tokenizer.vocab_size <= 290
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())
    assert (tokenizer.pad_id, tokenizer.eos_ids) == (0, (1,))


def test_bpe_refuses_a_size_without_room_for_the_bytes_and_an_empty_corpus():
    with pytest.raises(ValueError, match=r"^vocab_size=200 leaves no room.*use 258 or more$"):
        train_bpe(TEXTS, 200)
    with pytest.raises(ValueError, match=r"^there is no text to train a tokenizer on; pass.*$"):
        train_bpe([], 300)


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(TEXTS, 300)])
def test_a_saved_tokenizer_is_the_same_when_loaded_here_and_by_transformers(make, tmp_path):
    original = make()
    original.save(tmp_path)
    loaded = from_folder(tmp_path)
    assert loaded == original
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (original.pad_id, original.eos_ids[0])
    for text in [*TEXTS, ODD]:
        ids = original.encode(text)
        assert loaded.encode(text) == ids == theirs.encode(text, add_special_tokens=False)
        assert loaded.decode(ids) == text == theirs.decode(ids)


def test_saving_keeps_what_else_is_in_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    byte_tokenizer().save(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"temperature": 0.7, "eos_token_id": [257], "pad_token_id": 256}


def test_eos_comes_from_generation_config_then_config_then_the_tokenizer(tmp_path):
    settings = {"eos_token": "<eos>", "pad_token": "<pad>"}
    folder = folder_of(tmp_path, tokenizer_config=settings)
    assert from_folder(folder).eos_ids == (257,)
    folder_of(tmp_path, config={"eos_token_id": 10})
    assert from_folder(folder).eos_ids == (10,)
    folder_of(tmp_path, generation_config={"eos_token_id": [33, 10]})
    assert from_folder(folder).eos_ids == (33, 10)


def test_without_any_eos_the_remedy_is_named(tmp_path):
    folder = folder_of(tmp_path, tokenizer_config={"pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"no EOS is named; set 'eos_token_id' in generation_con"):
        from_folder(folder)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer here; a tokenizer folder holds tokenizer"):
        from_folder(tmp_path / "nothing")


def test_a_special_token_outside_the_vocabulary_is_named(tmp_path):
    folder = folder_of(tmp_path, tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(ValueError, match=r"eos_token '</s>' .* is not in the vocabulary; correct"):
        from_folder(folder)


def test_damaged_settings_are_named(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json:1: not JSON \(.*\); restore"):
        from_folder(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<eos>"},
        {"eos_token": "<eos>", "pad_token": "<eos>"},
        {"eos_token": {"content": "<eos>"}, "pad_token": None},
    ],
)
def test_a_pad_that_is_missing_or_eos_gets_a_filler_and_says_so_once(tmp_path, caplog, settings):
    folder = folder_of(tmp_path, tokenizer_config=settings)
    with caplog.at_level(logging.WARNING):
        tokenizer = from_folder(folder)
    assert tokenizer.pad_id == 0 and 0 not in tokenizer.eos_ids
    (record,) = caplog.records
    assert "padding is filled with id 0" in record.getMessage()
    # What is written afterwards names the filler, so that it is not said again.
    caplog.clear()
    tokenizer.save(folder / "saved")
    assert from_folder(folder / "saved") == tokenizer
    assert not caplog.records


def test_an_explicit_pad_is_taken_and_survives_saving(tmp_path):
    settings = {"eos_token": "<eos>", "pad_token": "<pad>"}
    folder = folder_of(tmp_path, tokenizer_config=settings)
    tokenizer = from_folder(folder, pad_id=7)
    assert tokenizer.pad_id == 7
    tokenizer.save(folder / "saved")
    assert from_folder(folder / "saved").pad_id == 7


def test_an_explicit_pad_that_is_an_eos_or_no_id_is_refused(tmp_path):
    folder = folder_of(tmp_path, tokenizer_config={"eos_token": "<eos>"})
    with pytest.raises(ValueError, match=r"pad_id=257 is an EOS .*; give another id or leave"):
        from_folder(folder, pad_id=257)
    with pytest.raises(ValueError, match=r"pad_id=258 is no id; use one of 0\.\.257$"):
        from_folder(folder, pad_id=258)


def test_a_vocabulary_larger_than_the_models_is_refused():
    check_vocab(byte_tokenizer(), 258)
    check_vocab(byte_tokenizer(), 512)
    with pytest.raises(ValueError, match=r"ids up to 257 but the model's vocab_size is 256; use"):
        check_vocab(byte_tokenizer(), 256)


def test_a_reward_model_that_reads_other_ids_or_another_template_is_refused():
    tokenizers.check_same(byte_tokenizer(), byte_tokenizer())
    chat = byte_tokenizer().with_template(tokenizers.PLAIN_TEMPLATE)
    tokenizers.check_same(chat, chat)
    with pytest.raises(ValueError, match="^policy and reward model differ in chat template; take"):
        tokenizers.check_same(chat, byte_tokenizer())
    with pytest.raises(ValueError, match="^policy and reward model differ in ids and EOS; take"):
        tokenizers.check_same(train_bpe(TEXTS, 300), byte_tokenizer())
    several = dataclasses.replace(byte_tokenizer(), eos_ids=(10, 257))
    tokenizers.check_same(several, byte_tokenizer())  # a chat model ends in several ways
    with pytest.raises(ValueError, match="^policy and reward model differ in EOS; take"):
        tokenizers.check_same(dataclasses.replace(several, eos_ids=(10,)), byte_tokenizer())


def test_a_folder_without_its_vocabulary_is_refused(tmp_path, real_data):
    """AutoTokenizer makes an empty tokenizer of it, or (4.57) a message about protobuf."""
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(real_data / "models" / "stories260K" / name, tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*; restore tokenizer.json, tok"):
        from_folder(tmp_path)


def test_a_continuation_never_changes_the_prompts_ids_and_spells_the_text():
    tokenizer = train_bpe(["abcabcabc"], 270)  # merges that cross the boundary below
    for prompt, completion in [("ab", "cabc"), ("abc", "abc"), ("a\n", "\nb"), ("x", " y")]:
        ids = tokenizer.encode(prompt) + tokenizer.encode_continuation(prompt, completion)
        assert ids[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
        assert tokenizer.decode(ids) == prompt + completion
    # Here the whole text has another first token, so that only the prompt's own ids will do.
    assert tokenizer.encode("abc")[:1] != tokenizer.encode("ab")[:1]


def test_a_word_marking_tokenizer_puts_no_space_that_the_text_does_not_have():
    """Llama style: a word is marked by a space before it, also the first one of a text."""
    backend = sentencepiece_like(["▁", "▁o", "▁one", "n", "e", "o", "\n", "▁ne", "ne"])
    tokenizer = tokenizers.Tokenizer(20, 0, (1,), None, backend, {})
    assert tokenizer.decode(tokenizer.encode("o") + tokenizer.encode("ne")) == "o ne"
    ids = tokenizer.encode("o") + tokenizer.encode_continuation("o", "ne")
    assert tokenizer.decode(ids) == "one" and ids != tokenizer.encode("one")
    spaced = tokenizer.encode("o") + tokenizer.encode_continuation("o", " ne")
    assert spaced == tokenizer.encode("o ne")


def sentencepiece_like(pieces: list[str]):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *pieces])}
    merges = [("▁", "o"), ("▁", "ne"), ("n", "e"), ("▁o", "ne")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.mark.parametrize("name", ["gpt2", "minimind", "mistral_v1"])
def test_ids_and_texts_equal_the_recorded_ones_of_transformers(real_data, name):
    folder = real_data / "tokenizers" / name
    reference = json.loads((folder / "reference.json").read_text())
    tokenizer = from_folder(folder)
    assert tokenizer.vocab_size == reference["len"]
    assert tokenizer.eos_ids == (reference["special"]["eos_token"][1],)
    for case in reference["encode"]:
        assert tokenizer.encode(case["text"]) == case["input_ids_no_special"], case["text"]
        assert tokenizer.encode_prompt(case["text"]) == case["input_ids"], case["text"]
        if "<" not in case["text"]:  # the recorded decoding keeps special tokens
            assert tokenizer.decode(case["input_ids_no_special"]) == case["decoded"]


@pytest.mark.parametrize(
    "name",
    ["tokenizers/gpt2", "tokenizers/minimind", "tokenizers/mistral_v1", "models/stories260K"],
)
def test_ids_equal_those_of_the_installed_transformers(real_data, tmp_path, name):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(real_data / name, model_max_length=10**9)
    tokenizer = from_folder(real_data / name)
    tokenizer.save(tmp_path)
    again, exported = from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again == tokenizer
    for text in [*stories(real_data)[:50], *TEXTS, "你好，世界", "def f(x):\n    return x  # ok"]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ids == again.encode(text) == exported.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_folder_without_tokenizer_json_goes_through_transformers(real_data, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real_data / "tokenizers/gpt2" / name).read_bytes())
    slow, fast = from_folder(tmp_path), from_folder(real_data / "tokenizers/gpt2")
    assert slow == fast
    for text in [*TEXTS, ODD]:
        assert slow.encode(text) == fast.encode(text)


def test_pads_of_real_tokenizers(real_data, caplog):
    minimind = from_folder(real_data / "tokenizers/minimind")
    assert (minimind.pad_id, minimind.eos_ids, minimind.bos_id) == (0, (2,), None)
    assert not caplog.records
    gpt2 = from_folder(real_data / "tokenizers/gpt2")
    assert (gpt2.pad_id, gpt2.eos_ids, gpt2.bos_id) == (0, (50256,), None)
    stories260k = from_folder(real_data / "models/stories260K")
    assert (stories260k.pad_id, stories260k.eos_ids, stories260k.bos_id) == (0, (1, 2), 1)
    assert stories260k.vocab_size == 512
    assert len(caplog.records) == 2


def test_a_story_cut_at_a_sentence_end_has_the_ids_of_the_whole(real_data):
    tokenizer = from_folder(real_data / "models/stories260K")
    cut = 0
    for story in stories(real_data)[:100]:
        prompt, dot, rest = story.partition(". ")
        if not dot:
            continue
        prompt, completion = prompt + ".", " " + rest
        ids = tokenizer.encode(prompt) + tokenizer.encode_continuation(prompt, completion)
        assert ids == tokenizer.encode(story)
        cut += 1
    assert cut > 90


def test_the_teacher_forced_text_of_stories260k_has_its_recorded_ids(real_data):
    folder = real_data / "models/stories260K"
    tokenizer = from_folder(folder)
    for case in json.loads((folder / "reference.json").read_text())["teacher_forced"]:
        assert tokenizer.encode_prompt(case["text"]) == case["input_ids"]


def test_loading_a_tokenizer_imports_neither_transformers_nor_torch(tmp_path):
    byte_tokenizer().save(tmp_path)
    code = (
        "import sys; from rlhf_jax.data.tokenizers import from_folder; "
        f"from_folder({str(tmp_path)!r}); "
        "assert not {'transformers', 'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def stories(real_data: pathlib.Path) -> list[str]:
    with gzip.open(real_data / "stories/tinystories_sample.jsonl.gz", "rt") as file:
        return [json.loads(line)["text"] for line in file]
