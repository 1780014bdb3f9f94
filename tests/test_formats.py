"""rlhf_jax.data.formats: rows of every format people have, into the one schema."""

import json
import re

import jaxtyping
import pytest

from rlhf_jax.data import batches, builders, formats, known_formats
from rlhf_jax.data.known_formats import FORMATS
from rlhf_jax.data.schema import Example, Message, at
from rlhf_jax.data.tokenizers import PLAIN_TEMPLATE, byte_tokenizer

CHAT = byte_tokenizer().with_template(PLAIN_TEMPLATE)
PAIR = (0, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_shape_checks():
    """The checks of every annotation cost more than reading a hundred thousand rows does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def said(*texts: str) -> tuple[Message, ...]:
    """User and assistant in turns."""
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def messages(*texts: str) -> list[dict]:
    return [turn._asdict() for turn in said(*texts)]


def sharegpt(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def located(where: str, function, *args):
    """Calls `function`; what is wrong with a row says where the row stands."""
    with at(where):
        return function(*args)


RANKED = {"prompt": "p", "responses": ["a", "b", "c"]}
ALPACA = {"instruction": "p", "input": "", "output": "a"}
ASKED = {"instruction": "p", "input": "q", "history": [["h", "i"]], "system": "s"}
ASKED_TURNS = (Message("system", "s"), *said("h", "i", "p\nq"))
VERSION_2 = [{"response": x, "source": "m", "score": y} for x, y in (("a", 7), ("b", 9), ("c", 7))]

# Format, row, example. Each row is recognised by its fields alone.
ROWS = [
    ("text", {"text": "t", "author": "x"}, Example("", ("t",), extra={"author": "x"})),
    ("prompt", {"prompt": "p", "id": 3}, Example("p", extra={"id": 3})),
    ("prompt", {"prompt": messages("p")}, Example(said("p"))),
    ("prompt_completion", {"prompt": "p", "completion": "a"}, Example("p", ("a",))),
    (
        "prompt_completion",
        {"prompt": messages("p"), "completion": messages("p", "a")[1:]},
        Example(said("p"), ("a",)),
    ),
    ("messages", {"messages": messages("p", "a", "q", "b")}, Example(said("p", "a", "q"), ("b",))),
    ("messages", {"messages": messages("p", "a", "q")}, Example(said("p", "a", "q"))),
    (
        "messages",
        {"conversations": sharegpt("p", "a"), "system": "s"},
        Example((Message("system", "s"), *said("p")), ("a",)),
    ),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, Example("p", ("a", "b"), PAIR)),
    (
        "preference",
        {
            "prompt": messages("p"),
            "chosen": messages("p", "a")[1:],
            "rejected": messages("p", "b")[1:],
            "margin": 2,
        },
        Example(said("p"), ("a", "b"), PAIR, margin=2.0),
    ),
    (
        # The prompt is what both have before the last answer, though the answers start alike.
        "preference",
        {"chosen": messages("p", "a", "q", "xy"), "rejected": messages("p", "a", "q", "xz")},
        Example(said("p", "a", "q"), ("xy", "xz"), PAIR),
    ),
    (
        "preference",
        {
            "prompt": "p",
            "chosen": messages("p", "a"),
            "rejected": messages("p", "b"),
            "score_chosen": 8,
            "score_rejected": 5.5,
        },
        Example(said("p"), ("a", "b"), PAIR, (8.0, 5.5)),
    ),
    (
        "messages_preference",
        {
            "conversations": sharegpt("p"),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        Example(said("p"), ("a", "b"), PAIR),
    ),
    (
        "messages_preference",
        {"conversations": sharegpt("p"), "chosen": "a", "rejected": "b"},
        Example(said("p"), ("a", "b"), PAIR),
    ),
    ("responses", RANKED | {"ranks": [1, 0, 1]}, Example("p", ("a", "b", "c"), (1, 0, 1))),
    (
        "responses",
        RANKED | {"scores": [7, 9, 7]},
        Example("p", ("a", "b", "c"), (1, 0, 1), (7.0, 9.0, 7.0)),
    ),
    (
        "labelled",
        {"prompt": "p", "completion": "a", "label": False},
        Example("p", ("a",), (), (0.0,)),
    ),
    (
        "labelled",
        {"messages": messages("p", "a"), "label": True},
        Example(said("p"), ("a",), (), (1.0,)),
    ),
    ("labelled", ALPACA | {"tag": True}, Example(said("p"), ("a",), (), (1.0,))),
    ("labelled", ALPACA | {"kto_tag": False}, Example(said("p"), ("a",), (), (0.0,))),
    ("alpaca", ALPACA, Example(said("p"), ("a",))),
    ("alpaca", ASKED | {"output": "a"}, Example(ASKED_TURNS, ("a",))),
    ("alpaca_ranked", ASKED | {"output": ["a", "b"]}, Example(ASKED_TURNS, ("a", "b"), PAIR)),
    (
        "alpaca_ranked",
        ALPACA | {"output": ["a", "b", "c"]},
        Example(said("p"), ("a", "b", "c"), (0, 1, 2)),
    ),
    (
        "alpaca_ranked",
        {"instruction": "p", "chosen": "a", "rejected": "b"},
        Example(said("p"), ("a", "b"), PAIR),
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: p\n\nAssistant: a\n\nHuman: q\nr\n\nAssistant: xy",
            "rejected": "\n\nHuman: p\n\nAssistant: a\n\nHuman: q\nr\n\nAssistant: xz",
        },
        Example(said("p", "a", "q\nr"), ("xy", "xz"), PAIR),
    ),
    (
        "gpt4_pair",
        {"user_input": "p", "completion_a": "a", "completion_b": "b"},
        Example(said("p"), ("a", "b"), PAIR),
    ),
    (
        "gpt4_scores",
        {"user_input": "p", "responses_and_scores": VERSION_2},
        Example(said("p"), ("a", "b", "c"), (1, 0, 1), (7.0, 9.0, 7.0)),
    ),
    (
        "alpaca_eval",
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 2},
        Example(said("p"), ("a", "b"), (1, 0)),
    ),
    (
        "alpaca_eval",
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 1.2},
        Example(said("p"), ("a", "b"), (0, 1)),
    ),
    (
        "alpaca_eval",
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 0},
        Example(said("p"), ("a", "b"), (0, 0)),
    ),
    ("scored", {"prompt": "p", "response": "a", "score": 3}, Example("p", ("a",), (), (3.0,))),
    (
        "stepwise",
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, 0.5]},
        Example("p", steps=("a", "b"), labels=(1.0, 0.5)),
    ),
    (
        "source_target",
        {"source": ["One.", "Two."], "target": ["a", "b"], "lang": "en"},
        Example("One. Two.\n", ("a", "b"), language="en"),
    ),
]


@pytest.mark.parametrize(("name", "row", "example"), ROWS)
def test_a_row_is_recognised_by_its_fields_and_read_into_the_schema(name, row, example):
    assert formats.read(row) == example
    assert formats.read(row, name) == example
    (format,) = [format for format in FORMATS if format.name == name]
    assert formats.read(row, format.read) == example


@pytest.mark.parametrize(("name", "row", "example"), ROWS)
def test_fields_that_a_format_does_not_use_are_kept_as_they_are(name, row, example):
    more = {"answer": 42, "references": ["x", {"y": None}], "meta": {"level": 3}}
    assert formats.read(row | more) == example._replace(extra={**example.extra, **more})


def test_what_a_prompts_row_holds_beside_it_stays_within_reach():
    answered = formats.prompt({"prompt": "1 + 1 =", "completion": "2", "steps": ["carry"]})
    assert (answered.completion, answered.extra) == ("2", {"steps": ["carry"]})
    # The rest of this row cannot be read, so it is kept as it is.
    faulty = formats.prompt({"prompt": "p", "chosen": 3, "rejected": "b", "answer": 2})
    assert faulty == Example("p", extra={"chosen": 3, "rejected": "b", "answer": 2})
    spoken = formats.prompt({"prompt": "p", "gold": 3}, formats.as_messages(None, formats.prompt))
    assert spoken == Example(said("p"), extra={"gold": 3})


def test_a_function_of_the_users_own_keeps_what_it_did_not_read_too():
    def read(row) -> Example:
        return Example(row["question"], (row["reply"],), extra={"length": len(row["reply"])})

    row = {"question": "p", "reply": "abc", "answer": 7, "lang": "de"}
    wanted = Example("p", ("abc",), language="de", extra={"answer": 7, "length": 3})
    assert formats.read(row, read) == wanted


def test_every_format_is_shown_by_a_row_above():
    assert {name for name, *_ in ROWS} | {"pandalm"} == {format.name for format in FORMATS}


@pytest.mark.parametrize(
    ("votes", "ranks"),
    [
        ((1, 1, 1), (0, 1)),
        ((2, 1, 2), (1, 0)),
        ((0, 0, 1), (0, 0)),
        ((0, 1, 2), (0, 0)),  # no majority is a tie, whoever votes first
        ((1, 0, 2), (0, 0)),
        ((2,), (1, 0)),
    ],
)
def test_several_annotators_decide_by_majority(votes, ranks):
    row = {"instruction": "p", "input": "", "response1": "a", "response2": "b"}
    row |= {f"annotator{i}": vote for i, vote in enumerate(votes, 1)}
    assert formats.read(row) == Example(said("p"), ("a", "b"), ranks)


def test_a_translation_needs_its_direction():
    row = {"en": "One.", "de": "Eins.", "fr": "Un."}
    with pytest.raises(ValueError, match=r"^the row is a translation without a direction; na"):
        formats.read(row)
    with pytest.raises(ValueError, match="^the row is a translation without a direction"):
        formats.prompt(row)
    german = known_formats.source_target("en", "de", template="Translate: {}\n")
    assert formats.read(row, german) == Example(
        "Translate: One.\n", ("Eins.",), language="de", extra={"fr": "Un."}
    )
    french = known_formats.source_target("fr", "en")
    assert formats.read({"translation": row}, french) == Example(
        "Un.\n", ("One.",), language="en", extra={"translation": row}
    )
    spoken = formats.as_messages(known_formats.source_target("en", "de"))
    assert formats.read(row, spoken).prompt == said("One.")


def test_fields_of_other_names_are_read_by_a_map():
    row = {"article": "long", "highlights": "short", "meta": {"stars": 4}}
    summary = formats.renamed({"prompt": "article", "completion": "highlights"})
    assert formats.read(row, summary) == Example("long", ("short",), extra={"meta": {"stars": 4}})
    rated = formats.renamed({"prompt": "article", "response": "highlights", "score": "meta.stars"})
    assert formats.read(row, rated).scores == (4.0,)
    assert formats.read(row, rated).extra == {"meta": {"stars": 4}}  # only a part of it was read
    with pytest.raises(ValueError, match=r"^'title' is missing; it is to be read as 'prompt'"):
        formats.read(row, formats.renamed({"prompt": "title"}))


FAULTS = [
    ({"instruction": "p", "output": "a", "text": "t"}, "the fields fit the formats 'text' and 'al"),
    (
        {"prompt": "p", "messages": [], "chosen": [], "rejected": []},
        "the fields fit the formats 'preference' and 'messages_preference'; name one by format=",
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
        "'ranks' put response 0 above 1, 'scores' below it; correct one of them .*",
    ),
    ({"question": "p"}, r"no known format has the fields \['question'\]; a demonstration has .*"),
    ({"messages": []}, r"'messages' must be a list of messages, got \[\]; a conv.*"),
    ({"messages": messages("p") * 2}, "roles are out of order: user after user; user and assi.*"),
    ({"messages": messages("p", "a")[1:]}, "roles are out of order: assistant after the start; .*"),
    (
        {"messages": [{"role": "bot", "content": "x"}]},
        r"'messages\[0\]' has the role 'bot'; use .*",
    ),
    ({"messages": messages("p", " ")}, r"'messages\[1\]\.content' is empty; fill it in or .*"),
    (
        {"messages": messages("p"), "label": True},
        "the conversation does not end with an answer; .*",
    ),
    (ALPACA | {"tag": "yes"}, "'tag' must be true or false, got 'yes'; a labelled answer .*"),
    (ALPACA | {"history": ["h"]}, r"'history\[0\]' must be \[question, answer\], got 'h'; .*"),
    (ALPACA | {"output": ["a"]}, "'output' holds 1; a ranking takes 2 or more; .*"),
    (
        RANKED | {"ranks": [0, 1, 2], "scores": [9, 7, 8]},
        "'ranks' put response 1 above 2, 'scores' below it; correct one of them .*",
    ),
    (RANKED | {"scores": [1, 2]}, "3 'responses' but 2 'scores'; give each its score"),
    (RANKED | {"scores": [1, 2, "3"]}, r"'scores\[2\]' must be a finite number, got '3'; an ann.*"),
    (
        {"chosen": messages("p", "a"), "rejected": messages("q", "b")},
        "'chosen' and 'rejected' differ before their last assistant turn; a comparison is .*",
    ),
    (
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "b"},
        "'rejected' does not start with a turn; both sides are one dialogue .*",
    ),
    (
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 3},
        "'preference' is 3; a judged pair has both answers and a verdict: 1, 2, or 0 for a tie",
    ),
    (
        {"prompt": "p", "response": "a", "score": True},
        "'score' must be a finite number, got True.*",
    ),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_a_fault_is_one_line_with_place_and_remedy(row, message):
    with pytest.raises(ValueError) as caught:
        located("prefs.jsonl:17", formats.read, row)
    assert re.match(f"prefs.jsonl:17: {message}", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^format='alpacca' is not known; did you mean 'alp.*"):
        formats.read(ALPACA, "alpacca")


def test_faulty_rows_are_dropped_and_counted_only_where_asked():
    rows = [ALPACA, ALPACA | {"output": " "}, ALPACA | {"instruction": 3}]
    with pytest.raises(ValueError, match=r"^row 2: 'output' is empty"):
        batches.demonstrations(rows, CHAT, 64, 64)
    examples = batches.demonstrations(rows, CHAT, 64, 64, on_bad_row="drop")
    assert examples.counts.dropped == {"faulty row": 2}
    assert examples.counts.first["faulty row"].startswith("row 2: 'output' is empty; fill")


def test_any_other_way_with_faulty_rows_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match=r"^on_bad_row='skip' must be 'error' or 'drop'$"):
        batches.demonstrations([ALPACA], CHAT, 64, 64, on_bad_row="skip")


def test_each_use_takes_the_rows_it_can_use():
    pair, judged = ALPACA | {"output": ["a", "b"]}, ALPACA | {"tag": False}
    assert formats.demonstration(pair).completion == "a"
    assert formats.prompt(pair).prompt == formats.prompt(ALPACA).prompt == said("p")
    with pytest.raises(ValueError, match="which may be a bad one to imitate; train a reward model"):
        formats.demonstration(judged)
    with pytest.raises(ValueError, match="^'chosen' is missing; a comparison has"):
        formats.comparison(judged)
    with pytest.raises(ValueError, match="^no response has a score; regression takes scores"):
        formats.annotation(pair)


# LLaMA-Factory's dataset_info.json.

INFO = {
    "plain": {"file_name": "plain.json"},
    "mapped": {
        "file_name": "mapped.json",
        "columns": {"prompt": "question", "response": "answer", "system": "rules"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
        "tags": {
            "role_tag": "who",
            "content_tag": "what",
            "user_tag": "me",
            "assistant_tag": "you",
        },
    },
    "labels": {
        "file_name": "labels.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "remote": {"hf_hub_url": "org/set"},
}
INFO_ROWS = {
    "plain": (ALPACA, Example(said("p"), ("a",))),
    "mapped": (
        {"question": "p", "answer": "a", "rules": "s", "output": "another thing"},
        Example((Message("system", "s"), *said("p")), ("a",), extra={"output": "another thing"}),
    ),
    "pairs": (
        {
            "talk": [{"who": "me", "what": "p"}],
            "good": {"who": "you", "what": "a"},
            "bad": {"who": "you", "what": "b"},
        },
        Example(said("p"), ("a", "b"), PAIR),
    ),
    "labels": (
        {"messages": messages("p", "a"), "label": False},
        Example(said("p"), ("a",), (), (0.0,)),
    ),
}


@pytest.mark.parametrize("name", INFO_ROWS)
def test_a_dataset_info_names_files_columns_and_tags(tmp_path, name):
    row, example = INFO_ROWS[name]
    (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps(INFO))
    path, format = formats.dataset_info(info, name)
    assert [formats.read(row, format) for row, _ in builders.load(path)] == [example]


def test_an_entry_that_is_not_there_or_not_local_is_named(tmp_path):
    info = tmp_path / "dataset_info.json"
    with pytest.raises(ValueError, match="dataset_info.json: cannot be read"):
        formats.dataset_info(info, "plain")
    info.write_text(json.dumps(INFO))
    with pytest.raises(ValueError, match=r"no dataset 'x'; it has labels, mapped, pairs, plain"):
        formats.dataset_info(info, "x")
    with pytest.raises(ValueError, match="'remote' has no 'file_name'; download its file and"):
        formats.dataset_info(info, "remote")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_samples": 9}, "'set' has 'num_samples', which is not read; write the rows out"),
        ({"columns": {"tools": "tools"}}, "'set' has 'tools', which is not read"),
        ({"columns": {"messages": "x", "images": "y"}}, "'set' has 'images', which is not read"),
        ({"formatting": "openai"}, "'set' has the formatting 'openai'; alpaca and sharegpt are"),
        ({"file_name": 3}, "'set' has no 'file_name'"),
        ({"columns": ["q"]}, "'columns' and 'tags' of 'set' must be objects"),
    ],
)
def test_an_entry_that_asks_for_what_is_not_read_is_refused(tmp_path, entry, message):
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"set": {"file_name": "x.json"} | entry}))
    with pytest.raises(ValueError, match=message):
        formats.dataset_info(info, "set")
    info.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        formats.dataset_info(info, "set")


def test_a_prompt_is_read_as_the_rest_of_its_row_says():
    """`prompt` repeats the question as text where the turns are messages."""
    chosen, rejected = messages("p", "a"), messages("p", "b")
    pair = {"prompt": "p", "chosen": chosen, "rejected": rejected}
    assert formats.prompt(pair).prompt == formats.read(pair).prompt == said("p")
    assert formats.prompt({"prompt": "p", "messages": chosen}).prompt == said("p")
    # Where nothing else can be read, the field it is.
    for more in ({"chosen": 3, "rejected": rejected}, {"text": "t"}, pair | {"messages": chosen}):
        assert formats.prompt({**more, "prompt": "p"}).prompt == "p"
    spoken = formats.as_messages(None, formats.prompt)
    assert formats.prompt({"prompt": "p", "gold": 3}, spoken).prompt == said("p")


@pytest.mark.parametrize("extra", [{"history": 5}, {"history": "q"}])
def test_a_history_that_is_no_list_is_a_fault_of_its_row(extra):
    with pytest.raises(ValueError, match="^'history' must be a list, got "):
        formats.read(ALPACA | extra)


def test_a_role_that_is_no_text_is_a_fault_of_its_row():
    turns = [{"role": ["user"], "content": "p"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"^'messages\[0\]' has the role \['user'\]; use"):
        formats.read({"messages": turns})


def test_a_ranking_above_an_equal_response_is_dropped_and_counted():
    rows = [
        {"prompt": "p", "responses": ["a", "a", "c"], "ranks": [0, 1, 2]},
        {"prompt": "q", "responses": ["a", "a", "c"], "ranks": [0, 0, 1]},
    ]
    examples = batches.comparisons(rows, CHAT, 64, 64)
    assert len(examples) == 1 and examples.where == ["row 2"]
    assert examples.counts.dropped == {batches.SAME_RESPONSES: 1}


# The real files: rows, rows without a fault, and one thing that is known of them.

GERMAN = known_formats.source_target("en", "de")
CHINESE = known_formats.source_target("en", "zh")
FILES = {
    "poems/song_ci_zh.jsonl.gz": (15817, 15817, None),
    "preference/alpaca_eval_gpt4.jsonl.gz": (9672, 9666, None),
    "preference/comparison_gpt4_en.json": (820, 820, None),
    "preference/comparison_gpt4_zh.json": (1842, 1842, None),
    "preference/dpo_en_demo.json": (222, 222, None),
    "preference/dpo_zh_500.jsonl": (374, 374, None),
    "preference/dpo_zh_demo.json": (231, 231, None),
    "preference/hh_harmless_base_test.jsonl.gz": (1701, 1691, None),
    "preference/kto_en_demo.json": (225, 225, None),
    "preference/kto_mix_test.json": (841, 841, None),
    "preference/oasst_rm_zh.json": (546, 546, None),
    "preference/pandalm_testset_v1.json": (721, 692, None),
    "sft/alpaca_en_demo.json": (743, 743, None),
    "sft/alpaca_zh_demo.json": (765, 765, None),
    "sft/oasst_sft_zh.json": (519, 519, None),
    "summarization/scitldr_a.jsonl.gz": (2414, 2414, None),
    "translation/multi30k/test_2016_flickr.jsonl.gz": (1000, 1000, GERMAN),
    "translation/multi30k/train.jsonl.gz": (23239, 23239, GERMAN),
    "translation/multi30k/val.jsonl.gz": (1014, 1014, GERMAN),
    "translation/tatoeba_en_zh.jsonl.gz": (20763, 20763, CHINESE),
}


def read_all(path, format=None) -> tuple[list[Example], int]:
    """The examples of a file and the number of its faulty rows."""
    examples, faults = [], 0
    for row, where in builders.load(path):
        try:
            examples.append(located(where, formats.read, row, format))
        except ValueError as error:
            assert str(error).startswith(where)
            faults += 1
    return examples, faults


@pytest.mark.parametrize("name", FILES)
def test_every_real_file_is_read_with_its_stated_number_of_rows(real_data, no_shape_checks, name):
    rows, sound, format = FILES[name]
    examples, faults = read_all(real_data / name, format)
    assert (len(examples) + faults, len(examples)) == (rows, sound)
    kinds = {(len(x.responses) > 1, bool(x.ranks), bool(x.scores)) for x in examples}
    if name.startswith("preference/"):
        labelled = {(False, False, True)}
        assert kinds == (labelled if "kto" in name else {(True, True, False)})
    else:
        assert not any(ranks or scores for _, ranks, scores in kinds)


def test_the_list_above_names_every_real_file(real_data):
    folders = ("poems", "preference", "sft", "summarization", "translation")
    found = {p for folder in folders for p in (real_data / folder).rglob("*.json*")}
    assert {str(path.relative_to(real_data)) for path in found} == set(FILES)


def test_facts_that_are_known_of_the_real_files(real_data, no_shape_checks):
    ranked, _ = read_all(real_data / "preference/oasst_rm_zh.json")
    sizes = [len(example.responses) for example in ranked]
    assert [sizes.count(k) for k in (2, 3, 4, 5, 6, 10)] == [289, 200, 47, 8, 1, 1]
    assert [len(x.prompt) for x in ranked].count(3) == 247  # one earlier exchange
    judged, _ = read_all(real_data / "preference/alpaca_eval_gpt4.jsonl.gz")
    assert sum(example.ranks == (0, 0) for example in judged) == 94
    human, _ = read_all(real_data / "preference/pandalm_testset_v1.json")
    assert {example.ranks for example in human} == {(0, 1), (1, 0), (0, 0)}
    pairs, _ = read_all(real_data / "preference/comparison_gpt4_en.json")
    assert pairs[0].responses[1] == "Red, Yellow, and Green."
    several, _ = read_all(real_data / "translation/tatoeba_en_zh.jsonl.gz", CHINESE)
    assert several[0]._replace(extra={}) == Example("Hi.\n", ("嗨。", "你好。"), language="zh")
    assert list(several[0].extra) == ["attribution"]
    assert sum(len(example.responses) > 1 for example in several) == 991
    chinese, _ = read_all(real_data / "preference/dpo_zh_500.jsonl")
    assert sum(example.prompt[0].role == "system" for example in chinese) == 69
