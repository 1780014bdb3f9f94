"""Formats in one line of text, for files whose fields have names of their own."""

import json
import logging

import pytest

from rlhf_jax.data import batches, builders, field_map, formats, tokenizers
from rlhf_jax.tasks import own_files

BYTES = tokenizers.byte_tokenizer()
JUDGED = {"input": "q", "output_1": "good", "output_2": "bad", "source": "forum"}
SUMMED = {"dialogue": "a: hi", "summary1": "one", "summary2": "two", "summary3": "three"}


@pytest.mark.parametrize(
    "text, label, ranks",
    [
        ("best=label", 1, (0, 1)),
        ("best=label", "2", (1, 0)),
        ("best=label", "output_2", (1, 0)),
        ("best=label", 2.0, (1, 0)),
        ("best0=label", 0, (0, 1)),
        ("best0=label", 1, (1, 0)),
    ],
)
def test_a_verdict_says_which_of_two_outputs_is_better(text, label, ranks):
    row = JUDGED | {"label": label}
    example = formats.comparison(row, f"prompt=input, responses=output_1+output_2, {text}")
    assert (example.prompt, example.responses, example.ranks) == ("q", ("good", "bad"), ranks)
    assert dict(example.extra) == {"source": "forum"}


def test_a_verdict_where_0_is_a_tie_is_that_of_a_known_format():
    text = "instruction=input,output_1=output_1,output_2=output_2,preference=label"
    ranks = [formats.comparison(JUDGED | {"label": x}, text).ranks for x in (0, 1, 2)]
    assert ranks == [(0, 0), (0, 1), (1, 0)]


def test_several_summaries_are_references_of_which_the_first_is_imitated():
    text = "prompt=dialogue,responses=summary1+summary2+summary3"
    example = formats.demonstration(SUMMED, text)
    assert example.responses == ("one", "two", "three") and example.ranks == ()
    assert example.completion == "one" and not example.extra
    assert formats.prompt(SUMMED, text).prompt == "a: hi"


@pytest.mark.parametrize(
    "row, text",
    [
        (SUMMED, "prompt=dialogue,response=summary1+summary2+summary3"),
        (SUMMED, "prompt=dialogue,completion=summary1+summary2+summary3"),
        ({"q": "a: hi", "all": ["one", "two", "three"]}, "prompt=q,response=all"),
    ],
)
def test_several_responses_are_a_demonstration_each(row, text):
    examples = batches.demonstrations([row], BYTES, 64, 64, format=text)
    texts = [BYTES.decode(row.documents[0].ids) for row in examples.rows]
    assert [x.removesuffix("<eos>")[-3:] for x in texts] == ["one", "two", "ree"]
    assert all("a: hi" in x for x in texts)
    assert [source.responses for source in examples.sources] == [("one",), ("two",), ("three",)]
    assert examples.counts.rows == 3 and examples.where == ["row 1"] * 3
    # As prompts they stay one row, whose reward can read all of the responses.
    (asked,) = batches.prompts([row], BYTES, 64, format=text).sources
    assert asked.responses == ("one", "two", "three")


def test_an_instruction_may_have_references():
    text = "instruction=dialogue,responses=summary1+summary2"
    example = formats.demonstration(SUMMED, text)
    assert (example.responses, example.completion) == (("one", "two"), "one")


def test_a_list_of_responses_has_a_best_one():
    row = {"q": "p", "answers": ["a", "b", "c"], "n": 2}
    example = formats.comparison(row, "prompt=q,responses=answers,best0=n")
    assert (example.responses, example.ranks) == (("a", "b", "c"), (1, 1, 0))
    with pytest.raises(ValueError, match="'n' is 3; 'best0' is 0 to 2; 'best' counts from 1"):
        formats.comparison(row | {"n": 3}, "prompt=q,responses=answers,best0=n")


def test_a_row_with_an_empty_response_is_faulty_as_a_whole():
    rows = [SUMMED, SUMMED | {"dialogue": "b", "summary2": " "}]
    text = "prompt=dialogue,response=summary1+summary2"
    with pytest.raises(ValueError, match=r"^row 2: 'completion\[1\]' is empty"):
        batches.demonstrations(rows, BYTES, 64, 64, format=text)
    kept = batches.demonstrations(rows, BYTES, 64, 64, format=text, on_bad_row="drop")
    assert (len(kept), kept.counts.dropped) == (2, {"faulty row": 1})


def test_fields_may_lie_inside_of_others():
    row = {"data": {"question": "q"}, "good": "a", "bad": "b", "a.b": "c"}
    example = formats.comparison(row, "prompt=data.question,chosen=good,rejected=bad")
    assert (example.prompt, example.responses) == ("q", ("a", "b"))
    assert formats.demonstration(row, "prompt=data.question,completion=a.b").completion == "c"
    deep = {"data": {"question": "q", "source": "s"}, "good": "a", "bad": "b"}
    example = formats.comparison(deep, "prompt=data.question,chosen=good,rejected=bad")
    assert dict(example.extra) == {"data": {"question": "q", "source": "s"}}


def test_fields_that_a_map_does_not_name_are_named_once(caplog):
    rows = [JUDGED | {"label": 1, "input": x, "meta": {"id": 1, "tag": "de"}} for x in "pqr"]
    rows[1] |= {"late": 1}
    text = "prompt=input,responses=output_1+output_2,best=label,language=meta.tag"
    with caplog.at_level(logging.WARNING):
        read = field_map.of(text, formats.read)
        examples = batches.comparisons(rows, BYTES, 4, 6, format=read)
    said = "fields that the map does not name are kept beside the examples, as `extra`: "
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{said}source, meta.id", f"{said}late"]
    extra = {"source": "forum", "meta": {"id": 1, "tag": "de"}}
    assert [source.extra for source in examples.sources] == [extra, extra | {"late": 1}, extra]
    assert {source.language for source in examples.sources} == {"de"}


def test_of_very_many_fields_the_first_are_named(caplog):
    read = field_map.of("prompt=p", formats.read)
    with caplog.at_level(logging.WARNING):
        read({"p": "q"} | {f"f{i}": i for i in range(field_map.NAMED + 5)})
        read({"p": "q", "another": 1})
    (record,) = caplog.records
    assert record.getMessage().endswith(f"f{field_map.NAMED - 1}, and more")


@pytest.mark.parametrize(
    "text, said",
    [
        ("prompt=", "format='prompt=': 'prompt=' is not OURS=THEIRS; write for example"),
        ("=input", "'=input' is not OURS=THEIRS"),
        ("=", "'=' is not OURS=THEIRS"),
        (",", "'' is not OURS=THEIRS"),
        ("prompt=input,", "'' is not OURS=THEIRS"),
        ("prompt,chosen", "'prompt' is not OURS=THEIRS"),
        ("promt=input", "'promt' is no field of a format; did you mean prompt?"),
        ("xyz=input", "'xyz' is no field of a format; they are prompt, text"),
        ("prompt=input,prompt=label", "'prompt' is named twice"),
        ("prompt=a,chosen=a,rejected=b", "the field 'a' of the file is named twice"),
        ("prompt=p,responses=a+a,best=x", "the field 'a' of the file is named twice"),
        ("prompt=input,best=label", "'best' is the number of one of the responses"),
        ("responses=a+b,best=x,best0=y", "'best' and 'best0' say the same"),
        ("prompt=p,responses=a+b,best=x,ranks=y", "'best' and 'ranks' say the same"),
        ("prompt=p,response=a,completion=b", "'response' and 'completion' say the same"),
        ("prompt=p,response=a+b,score=s", "'score' is of one response, but there are several"),
        ("prompt=a++b", "'prompt=a++b' is not OURS=THEIRS"),
        ("prompt=a+b", "'prompt' is one field; those that join several are completion"),
        ("x=y," * 9999 + "prompt=a", "...: 'x' is no field of a format"),
    ],
)
def test_a_map_that_is_none_is_refused(text, said):
    with pytest.raises(ValueError) as error:
        formats.located("file.jsonl", text)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"output_1": "x", "output_2": "y", "label": 1}, "'input' is missing; it is to be read as"),
        (
            {"inputs": "q"},
            "'input' is missing, did you mean 'inputs'?; it is to be read as 'prompt'",
        ),
        (JUDGED | {"label": 3}, "'label' is 3; 'best' is 1 to 2 or the name of a field; 'best0'"),
        (JUDGED | {"label": 0}, "'label' is 0; 'best' is 1 to 2"),
        (JUDGED | {"label": -1}, "'label' is -1; 'best' is 1 to 2"),
        (JUDGED | {"label": True}, "'label' is True; 'best' is 1 to 2"),
        (JUDGED | {"label": 1.5}, "'label' is 1.5"),
        (JUDGED | {"label": "9" * 5000}, "'label' is '999"),
        (JUDGED | {"label": None}, "'label' is None"),
        (JUDGED | {"label": "worse"}, "'label' is 'worse'"),
        (JUDGED | {"label": 1, "output_2": ""}, "'responses[1]' is empty"),
    ],
)
def test_a_row_that_a_map_does_not_fit_is_named_with_its_fields(row, said):
    with pytest.raises(ValueError) as error:
        formats.comparison(row, "prompt=input,responses=output_1+output_2,best=label")
    assert said in str(error.value)


SHOWN = "such as prompt=FIELD,chosen=FIELD,rejected=FIELD (docs/formats.md)"
FAULTS = {
    "promt=input": "--preferences-format='promt=input': 'promt' is no field of a format",
    "prefernce": "--preferences-format='prefernce' is not known; did you mean 'preference'?",
    "prompt=inptu,chosen=output_1,rejected=output_2": "'inptu' is missing, did you mean 'input'?",
    "prompt=input": "judged.jsonl:1: 'chosen' is missing",
    "prompt=input,responses=output_1+output_2": "judged.jsonl:1: 'ranks' is missing",
    "responses=output_1+output_2,best=label": "judged.jsonl:1: no known format has the fields",
    "prompt=input,chosen=output_1": "judged.jsonl:1: 'rejected' is missing",
    "": "judged.jsonl:1: 'instruction' is missing",
}


def opened(tmp_path, rows, text, on_bad_row="error"):
    """The file of comparisons that a command line names; what it prints is an error's text."""
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = own_files.Common(
        preferences=str(file), preferences_format=text, on_bad_row=on_bad_row, held_out=0.5
    )
    return own_files.open_file(config, "preferences", formats.comparison)


@pytest.mark.parametrize("text", FAULTS)
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_where_no_row_can_be_read_the_flag_of_the_format_is_named(tmp_path, text, on_bad_row):
    rows = [JUDGED | {"label": 1, "input": x} for x in "abcdef"]
    with pytest.raises(ValueError) as error:
        opened(tmp_path, rows, text, on_bad_row)
    said = str(error.value)
    assert FAULTS[text] in said and "\n" not in said and "--preferences-format" in said
    assert "format=," not in said and "--on-bad-row" not in said
    if " is missing" in FAULTS[text]:
        assert "none of its 6 rows can be read as a comparison" in said and said.endswith(SHOWN)


def test_where_some_rows_can_be_read_dropping_the_others_is_the_remedy(tmp_path):
    rows = [JUDGED | {"label": 1 + (x == "c"), "input": x} for x in "abcdef"]
    rows[3] = {"input": "d"}
    text = "prompt=input,responses=output_1+output_2,best=label"
    with pytest.raises(ValueError, match=r"judged.jsonl:4: 'output_1' is missing; .*") as error:
        opened(tmp_path, rows, text)
    assert str(error.value).endswith("; or leave such rows out by --on-bad-row drop")
    found = opened(tmp_path, rows, text, "drop")
    assert len(found.rows) + len(found.held_out) == 6  # the faulty one is counted where it is used


def test_a_format_of_no_file_is_refused():
    with pytest.raises(ValueError, match="^--preferences-format 'hh' is of no file: --preferences"):
        own_files.Common(preferences_format="hh")


def test_files_of_both_shapes_are_read(tmp_path):
    judged, summed = tmp_path / "judged.jsonl", tmp_path / "summed.jsonl"
    judged.write_text("".join(json.dumps(JUDGED | {"label": 2, "input": x}) + "\n" for x in "ab"))
    summed.write_text("".join(json.dumps(SUMMED | {"dialogue": x}) + "\n" for x in "abc"))
    for make, file, text, count in (
        (batches.comparisons, judged, "prompt=input,responses=output_1+output_2,best=label", 2),
        (batches.demonstrations, summed, "prompt=dialogue,response=summary2", 3),
        (batches.demonstrations, summed, "prompt=dialogue,response=summary1+summary2+summary3", 9),
        (batches.demonstrations, summed, "prompt=dialogue,responses=summary1+summary2", 3),
    ):
        source, format = formats.located(str(file), text)
        assert len(make(builders.load(source), BYTES, 4, 8, format=format)) == count
