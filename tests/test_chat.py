"""rlhf_jax.data.chat: one renderer, transformers' ids, and a mask by the offsets of tokens."""

import json

import numpy as np
import pytest

from rlhf_jax.data import batches, chat
from rlhf_jax.data.schema import Message
from rlhf_jax.data.tokenizers import PLAIN_TEMPLATE, byte_tokenizer, from_folder, train_bpe

TALK = [
    Message("system", "Be brief. 简短。"),
    Message("user", "什么是三原色？ 🎨"),
    Message("assistant", "红、蓝、黄。"),
    Message("user", "And in  English?\n"),
    Message("assistant", "Red, blue,\n yellow."),
]
DICTS = [turn._asdict() for turn in TALK]
BYTES = byte_tokenizer().with_template(PLAIN_TEMPLATE)
EOS = BYTES.eos_ids[0]
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def plain(template: str):
    return byte_tokenizer().with_template(template)


# Against transformers.


@pytest.mark.parametrize("ask", [False, True])
def test_the_recorded_chat_of_a_real_tokenizer_is_reproduced(real_data, ask):
    folder = real_data / "tokenizers/minimind"
    case = json.loads((folder / "reference.json").read_text())["chat"]
    turns = [Message(**turn) for turn in case["messages"]]
    tokenizer = from_folder(folder)
    text = chat.render(tokenizer, turns[:1] if ask else turns, ask=ask)
    assert text == case["text_generation_prompt" if ask else "text"]


TOKENIZERS = ["minimind", "gpt2", "mistral_v1"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE, CHATML])
def test_ids_are_those_of_apply_chat_template_up_to_the_last_eos(real_data, name, template):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    tokenizer = from_folder(real_data / "tokenizers" / name)
    if template is None and tokenizer.chat_template is None:
        with pytest.raises(ValueError, match="the tokenizer has no chat template; use the tok"):
            chat.prompt(tokenizer, TALK[:2])
        return
    if template is not None:
        tokenizer, theirs.chat_template = tokenizer.with_template(template), template
    apply = theirs.apply_chat_template
    whole = apply(DICTS, tokenize=True, return_dict=False)
    ids, said = chat.conversation(tokenizer, TALK)
    if ids[-1] == whole[len(ids) - 1]:
        assert ids == whole[: len(ids)]  # only what follows the last EOS is cut
    else:
        # This template has no EOS of this tokenizer: it is put where the white space was.
        assert ids[-1] in tokenizer.eos_ids and ids[:-1] == whole[: len(ids) - 1]
    asked = apply(DICTS[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat.prompt(tokenizer, TALK[:-1]) == asked
    # What is trained goes on from what the sampler is fed, and is the answer and EOS.
    assert ids[: len(asked)] == asked and said == [i >= len(asked) for i in range(len(ids))]
    assert tokenizer.decode(ids[len(asked) :]).replace("<|im_end|>", "").strip() == TALK[-1].content


def test_a_template_travels_with_the_saved_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    for tokenizer in (BYTES, train_bpe([t.content for t in TALK], 400).with_template(CHATML)):
        (tmp_path / "chat_template.jinja").write_text("of another model")
        tokenizer.save(tmp_path)
        again, theirs = from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert again.chat_template == tokenizer.chat_template
        ids, said = chat.conversation(tokenizer, TALK)
        assert chat.conversation(again, TALK) == (ids, said)
        whole = theirs.apply_chat_template(DICTS, tokenize=True, return_dict=False)
        assert whole[: len(ids) - 1] == ids[:-1]


def test_of_several_templates_the_default_one_is_used(tmp_path):
    BYTES.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    path.write_text(json.dumps(settings | {"chat_template": several}))
    assert from_folder(tmp_path).chat_template == "y"


# What is trained.


def test_the_plain_template_reads_as_it_is_meant():
    assert chat.render(BYTES, TALK[1:4], ask=True) == (
        "user:\n什么是三原色？ 🎨\nassistant:\n红、蓝、黄。<eos>\n"
        "user:\nAnd in  English?\nassistant:\n"
    )


def test_the_last_answer_or_all_of_them_are_trained_each_with_its_eos():
    answers = [[*turn.content.encode(), EOS] for turn in TALK if turn.role == "assistant"]
    ids, said = chat.conversation(BYTES, TALK)
    assert [i for i, on in zip(ids, said) if on] == answers[-1]
    same, both = chat.conversation(BYTES, TALK, "all")
    assert same == ids
    assert [i for i, on in zip(ids, both) if on] == [*answers[0], *answers[1]]
    assert ids[-1] == EOS  # nothing after the end


def test_a_template_without_eos_gets_one_at_the_end_and_cannot_train_earlier_answers():
    tokenizer = plain("{% for m in messages %}[{{ m.content }}] {% endfor %}")
    ids, said = chat.conversation(tokenizer, [Message("user", "p"), Message("assistant", "yes")])
    assert ids == [*b"[p] [yes]", EOS]
    assert said == [False] * 4 + [True] * 6
    chatml = plain(CHATML)
    with pytest.raises(ValueError, match="does not end every answer with an EOS, so that nothing"):
        chat.conversation(chatml, TALK, "all")


def test_a_token_across_the_boundary_counts_as_the_answers():
    tokenizer = train_bpe(["Q: x A: yes"] * 9, 300).with_template(
        "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' A:') }}"
        "{% endfor %}"
    )
    turns = [Message("user", "Q: x"), Message("assistant", " yes")]
    ids, said = chat.conversation(tokenizer, turns)
    assert tokenizer.decode([i for i, on in zip(ids, said) if on]) == " yes"
    crossing = train_bpe(["abcabc"] * 9, 300).with_template(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{{ '' if add_generation_prompt else eos_token }}"
    )
    ids, said = chat.conversation(crossing, [Message("user", "ab"), Message("assistant", "cabc")])
    assert crossing.decode(ids) == "abcabc"
    assert said[-1] and "cabc" in crossing.decode([i for i, on in zip(ids, said) if on])


# Templates of models that think: the turn is opened in another way than a finished one is written.
FINISHED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ HEADER + CONTENT + END }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ HEADER + OPENING }}{% endif %}"
)


def thinking(header: str, opening: str, content: str, end: str) -> str:
    parts = {"HEADER": repr(header), "OPENING": repr(opening), "END": repr(end)}
    template = FINISHED.replace("CONTENT", content)
    for name, text in parts.items():
        template = template.replace(name, text)
    return template


THINKING = {
    "r1": thinking(
        "<|Assistant|>", "<think>\n", "m.content.split('</think>')[-1]", "<|end_of_sentence|>"
    ),
    "qwq": thinking(
        "<|im_start|>assistant\n",
        "<think>\n",
        "m.content.split('</think>')[-1].lstrip('\n')",
        "<|im_end|>\n",
    ),
    "no_think": thinking(
        "<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "m.content | trim", "<|im_end|>\n"
    ),
}
# Parts of the markers, of the prompt and of the mark that finds the answer.
SHORT = ["c", "e|>", "n", "<", "end", "im_end|>", "think", "p", "answer7f3a9c1e5b8d2046", "0 0"]


@pytest.mark.parametrize("answer", SHORT)
@pytest.mark.parametrize("name", THINKING)
def test_a_short_answer_is_not_taken_for_a_part_of_a_marker(name, answer):
    tokenizer = plain(THINKING[name])
    end = "<|end_of_sentence|>" if name == "r1" else "<|im_end|>"
    ids, said = chat.conversation(tokenizer, [Message("user", "p"), Message("assistant", answer)])
    trained = [i for i, on in zip(ids, said) if on]
    assert trained == [*(answer + end).encode(), EOS]
    assert ids == chat.prompt(tokenizer, [Message("user", "p")]) + trained


@pytest.mark.parametrize(
    ("name", "answer", "kept"),
    [
        ("r1", "<think>because</think>c", "c"),
        ("r1", " c ", " c "),
        ("qwq", "<think>\nend\n</think>\n\nend", "end"),
        ("no_think", "\n c \n", "c"),
    ],
)
def test_what_a_template_leaves_of_an_answer_is_found_where_it_is_trimmed_or_cut(
    name, answer, kept
):
    turns = [Message("user", "c"), Message("assistant", answer)]
    ids, said = chat.conversation(plain(THINKING[name]), turns)
    trained = bytes(i for i, on in zip(ids, said) if on and i != EOS).decode()
    assert trained.removesuffix("<|im_end|>").removesuffix("<|end_of_sentence|>") == kept


def test_an_answer_that_cannot_be_found_in_its_text_is_refused_by_name():
    turns = [Message("user", "p"), Message("assistant", "c")]
    shouting = plain(thinking("A:", "<think>", "m.content | upper", "<end>"))
    with pytest.raises(ValueError, match="does not write an answer as it is, once, so that what"):
        chat.conversation(shouting, turns)
    twice = plain(thinking("A:", "<think>", "m.content + m.content", "<end>"))
    with pytest.raises(ValueError, match="does not write an answer as it is, once, so that what"):
        chat.conversation(twice, turns)
    by_length = "(m.content if m.content | length > 5 else 'short: ' + m.content + '!')"
    uneven = plain(thinking("A:", "<think>", by_length, "<end>"))
    ids, _ = chat.conversation(uneven, turns)
    assert ids == [*b"<|user|>p\nA:<think>short: c!<end>", EOS]  # as the template has it
    by_length = "('A:' if m.content | length > 5 else 'B:') + m.content"
    uneven = plain(thinking("", "A:<think>", by_length, "<end>"))
    rows = [{"messages": [turn._asdict() for turn in turns]}]
    with pytest.raises(ValueError, match="^row 1: the chat template writes this answer into anoth"):
        batches.demonstrations(rows, uneven, 64, 64)


def test_a_template_that_drops_thoughts_still_goes_on_from_what_is_fed():
    """As R1's: the turn is opened with <think>, and a finished turn is without it."""
    tokenizer = plain(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content.split('</think>')[-1] }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:<think>' }}{% endif %}"
    )
    turns = [Message("user", "p"), Message("assistant", "yes")]
    ids, said = chat.conversation(tokenizer, turns)
    assert ids == [*b"u:pa:<think>yes", EOS]
    assert [i for i, on in zip(ids, said) if on] == [*b"yes", EOS]
    more = [*turns, Message("user", "q"), Message("assistant", "no")]
    with pytest.raises(ValueError, match="writes earlier turns in another way than the last one"):
        chat.conversation(tokenizer, more, "all")


def test_an_answer_of_which_the_template_leaves_nothing_is_a_faulty_row():
    tokenizer = plain(PLAIN_TEMPLATE.replace("| trim", "| replace('gone', '') | trim"))
    rows = [
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": x}]}
        for x in ("here", "gone")
    ]
    with pytest.raises(ValueError, match="^row 2: an answer is empty after templating; fill it"):
        batches.demonstrations(rows, tokenizer, 64, 64)
    kept = batches.demonstrations(rows, tokenizer, 64, 64, on_bad_row="drop")
    assert (len(kept), kept.counts.dropped) == (1, {"faulty row": 1})


def test_what_a_template_refuses_is_a_faulty_row_and_a_broken_template_is_said():
    refusing = plain("{{ raise_exception('no system turn') if messages[0].role == 'system' }}")
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]}
    with pytest.raises(
        ValueError, match=r"^row 1: the chat template refuses the messages \(no sys"
    ):
        batches.prompts([row], refusing, 64)
    with pytest.raises(ValueError, match="the chat template is no jinja template"):
        chat.render(plain("{% for %}"), TALK)
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        chat.render(plain("{{ messages.__class__.__mro__ }}{{ ''.__class__.mro() }}"), TALK)


def test_messages_without_a_template_are_refused_with_the_remedy_even_where_rows_may_be_dropped():
    row = {"instruction": "p", "output": "a"}
    with pytest.raises(
        ValueError, match=r"no chat template; use the tokenizer of a chat model, or "
    ):
        batches.demonstrations([row], byte_tokenizer(), 64, 64, on_bad_row="drop")


def test_a_templates_generation_marks_and_date_are_understood():
    tokenizer = plain(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | tojson }}{% endif %}"
        "{% endfor %}{{ strftime_now('%%') }}"
    )
    assert chat.render(tokenizer, [Message("user", "<é>"), Message("assistant", "x")]) == (
        '"<é>"x<eos>%'
    )


# Rows of messages as batches.

PAIR = {"instruction": "p", "input": "", "output": ["good", "bad"]}


def test_demonstrations_comparisons_and_prompts_share_one_rendering():
    fed = batches.prompts([PAIR], BYTES, 64)[0]
    fed = fed.tokens[fed.attend > 0].tolist()
    assert fed == [*b"user:\np\nassistant:\n"]
    shown = batches.demonstrations([PAIR], BYTES, 64, 64)[0]
    assert shown.tokens[shown.attend > 0].tolist() == [*fed, *b"good", EOS]
    assert shown.tokens[shown.mask > 0].tolist() == [*b"good", EOS]
    both = batches.comparisons([PAIR], BYTES, 64, 64)[0]
    rows = [both.tokens[k][both.attend[k] > 0].tolist() for k in (0, 1)]
    assert rows == [[*fed, *b"good", EOS], [*fed, *b"bad", EOS]]
    np.testing.assert_array_equal(both.scores, [1, 0])


def test_the_limits_of_prompt_and_answer_hold_for_rendered_text():
    prompt, answer = len(b"user:\np\nassistant:\n"), len(b"good") + 1
    assert len(batches.comparisons([PAIR], BYTES, prompt, answer)) == 1
    for limits, reason in (
        ((prompt - 1, answer), batches.LONG_PROMPT),
        ((prompt, answer - 1), batches.LONG_RESPONSE),
    ):
        with pytest.raises(ValueError, match=f"1 dropped: 1 {reason}"):
            batches.comparisons([PAIR], BYTES, *limits)


def test_a_conversation_trained_on_all_its_answers_has_the_room_of_both_limits():
    rows = [{"messages": DICTS[1:]}]
    ids, said = chat.conversation(BYTES, TALK[1:], "all")
    fits = batches.demonstrations(rows, BYTES, 1, len(ids) - 1, turns="all")
    assert fits[0].mask.tolist() == [float(on) for on in said]
    with pytest.raises(ValueError, match=batches.LONG_TEXT):
        batches.demonstrations(rows, BYTES, 1, len(ids) - 2, turns="all")


def test_real_conversations_survive_the_way_from_file_to_batch(real_data, tmp_path, monkeypatch):
    from rlhf_jax.data import builders

    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    tokenizer = from_folder(real_data / "tokenizers/minimind")
    rows = builders.load(real_data / "preference/dpo_zh_demo.json", "train[:20]")
    examples = batches.comparisons(rows, tokenizer, 512, 1024)
    assert len(examples) > 10
    for i, where in enumerate(examples.where):
        row = next(row for row, place in rows if place == where)
        example = examples[i]
        text = tokenizer.decode(example.tokens[0][example.attend[0] > 0])
        assert row["chosen"]["value"].strip() in text
