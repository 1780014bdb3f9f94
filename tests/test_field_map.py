"""Formats in one line of text, for files whose fields have names of their own."""

import json
import logging

import pytest

from rlhf_jax.data import batches, formats, tokenizers

BYTES = tokenizers.byte_tokenizer()
JUDGED = {"input": "q", "output_1": "good", "output_2": "bad", "source": "forum"}
SUMMED = {"dialogue": "a: hi", "summary1": "one", "summary2": "two", "summary3": "three"}


@pytest.mark.parametrize(
    "text, label, ranks",
    [
        ("best=label", 1, (0, 1)),
        ("best=label", "2", (1, 0)),
        ("best=label", "output_2", (1, 0)),
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


def test_fields_may_lie_inside_of_others():
    row = {"data": {"question": "q"}, "good": "a", "bad": "b", "a.b": "c"}
    example = formats.comparison(row, "prompt=data.question,chosen=good,rejected=bad")
    assert (example.prompt, example.responses) == ("q", ("a", "b"))
    assert formats.demonstration(row, "prompt=data.question,completion=a.b").completion == "c"


def test_fields_that_a_map_does_not_name_are_named_once(caplog):
    rows = [JUDGED | {"label": 1, "input": x} for x in "pq"]
    with caplog.at_level(logging.WARNING):
        examples = batches.comparisons(
            rows, BYTES, 4, 6, format="prompt=input,responses=output_2+output_1,best=label"
        )
    assert [record.getMessage() for record in caplog.records] == [
        "fields that the map does not name are kept beside the examples, as `extra`: source"
    ]
    assert [source.extra for source in examples.sources] == [{"source": "forum"}] * 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("prompt=", "has the part 'prompt='; write for example"),
        ("=input", "has the part '=input'"),
        ("prompt=input,", "has the part ''"),
        ("prompt,chosen", "has the part 'prompt'"),
        ("promt=input", "'promt' is no field of a format; did you mean prompt?"),
        ("xyz=input", "'xyz' is no field of a format; they are prompt, completion"),
        ("prompt=input,prompt=label", "names 'prompt' twice"),
        ("prompt=input,best=label", "best is one number of one of the responses"),
        ("responses=a+b,best=x,best0=y", "best and best0 is one number"),
        ("prompt=a++b", "has the part 'prompt=a++b'"),
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
        (JUDGED | {"label": None}, "'label' is None"),
        (JUDGED | {"label": "worse"}, "'label' is 'worse'"),
        (JUDGED | {"label": 1, "output_2": ""}, "'responses[1]' is empty"),
    ],
)
def test_a_row_that_a_map_does_not_fit_is_named_with_its_fields(row, said):
    with pytest.raises(ValueError) as error:
        formats.comparison(row, "prompt=input,responses=output_1+output_2,best=label")
    assert said in str(error.value)


def test_files_of_both_shapes_are_read(tmp_path):
    judged, summed = tmp_path / "judged.jsonl", tmp_path / "summed.jsonl"
    judged.write_text("".join(json.dumps(JUDGED | {"label": 2, "input": x}) + "\n" for x in "ab"))
    summed.write_text("".join(json.dumps(SUMMED | {"dialogue": x}) + "\n" for x in "abc"))
    from rlhf_jax.data import builders

    for make, file, text, count in (
        (batches.comparisons, judged, "prompt=input,responses=output_1+output_2,best=label", 2),
        (batches.demonstrations, summed, "prompt=dialogue,response=summary2", 3),
        (batches.demonstrations, summed, "prompt=dialogue,responses=summary1+summary2", 3),
    ):
        source, format = formats.located(str(file), text)
        assert len(make(builders.load(source), BYTES, 4, 8, format=format)) == count
