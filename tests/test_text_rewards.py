"""Metrics of text as rewards: values by hand, their scale from 0 to 1, and bad references."""

import functools
import itertools
import math
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import tiny

from rlhf_jax.data import embeddings
from rlhf_jax.data.embeddings import Embeddings
from rlhf_jax.data.schema import BadRow, Example
from rlhf_jax.rewards import host, text

CAT = "the cat sat on the mat"


def score(reward, response, **row):
    """The score of one response to a row with these fields."""
    (found,) = reward(["p"], [response], [Example("p", **row)])
    return found


# ------------------------------------------------------------------------------------------- BLEU


@pytest.mark.parametrize(
    "smoothing, four, printed",
    [  # "the cat on the mat" has 5, 3, 1 and 0 matches of 5, 4, 3 and 2
        ("none", 0, 0),
        ("add-1", (1 + 0) / (1 + 2), 0.49474),
        ("exp", 1 / 2 / 2, 0.40937),
        ("floor", 0.1 / 2, 0.27376),
    ],
)
def test_bleu_is_the_brevity_penalty_times_the_mean_precision(smoothing, four, printed):
    two, three = (4 / 5, 2 / 4) if smoothing == "add-1" else (3 / 4, 1 / 3)
    found = text.sentence_bleu("the cat on the mat", CAT, smoothing=smoothing)
    by_hand = math.exp(1 - 6 / 5) * (5 / 5 * two * three * four) ** (1 / 4)
    assert found == pytest.approx(by_hand, abs=1e-12)
    assert found == pytest.approx(printed, abs=5e-6)


@pytest.mark.parametrize(
    "smoothing, effective_order, expected",
    [
        ("exp", False, 0.0),
        ("exp", True, math.exp(-1)),
        ("none", True, math.exp(-1)),
        ("add-1", False, math.exp(-1)),
        ("add-1", True, math.exp(-1)),
    ],
)
def test_bleu_of_three_words_leaves_out_the_four_grams_that_it_does_not_have(
    smoothing, effective_order, expected
):
    found = text.sentence_bleu(
        "on the mat", CAT, smoothing=smoothing, effective_order=effective_order
    )
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smoothing", ["none", "add-1", "floor", "exp"])
@pytest.mark.parametrize("response", ["", "   ", "a dog barked loudly outside"])
def test_bleu_of_nothing_in_common_is_0_however_it_is_smoothed(smoothing, response):
    assert text.sentence_bleu(response, CAT, smoothing=smoothing) == 0


def test_bleu_reads_chinese_by_characters():
    response, reference = "我喜欢猫和狗", "我喜欢猫和鱼"
    assert text.sentence_bleu(response, reference) == 0  # one word each, and another one
    by_hand = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4)
    for tokenize in ("zh", "char"):
        found = text.sentence_bleu(response, reference, tokenize=tokenize)
        assert found == pytest.approx(by_hand)


# --------------------------------------------------------------------------------- chrF and ROUGE


def test_chrf_averages_precision_and_recall_over_the_lengths_that_both_have():
    precision, recall = (2 / 2 + 1 / 1) / 2, (2 / 3 + 1 / 2) / 2  # of 1- and 2-grams
    by_hand = (1 + 4) * precision * recall / (4 * precision + recall)
    assert text.chrf("ab", "abc") == pytest.approx(by_hand)
    assert text.chrf("a b", "ab") == pytest.approx(1)
    assert text.chrf("", "ab") == text.chrf("xy", "ab") == 0


@pytest.mark.parametrize(
    "kind, response, precision, recall",
    [
        ("rouge1", "the cat the", 3 / 3, 3 / 6),
        ("rouge2", "the cat the", 1 / 2, 1 / 5),
        ("rougeL", "the cat the", 3 / 3, 3 / 6),
        ("rouge1", "Mat, the cat!", 3 / 3, 3 / 6),
        ("rougeL", "Mat, the cat!", 2 / 3, 2 / 6),
    ],
)
def test_rouge_is_the_harmonic_mean_of_precision_and_recall(kind, response, precision, recall):
    by_hand = 2 * precision * recall / (precision + recall)
    assert text.rouge(response, CAT, kind=kind) == pytest.approx(by_hand)
    assert text.rouge("", CAT, kind=kind) == 0


def test_rouge_refuses_a_reference_in_which_it_sees_no_word():
    with pytest.raises(BadRow, match="no word of a-z or 0-9 in the reference '我喜欢猫'; use chrf"):
        text.rouge("我喜欢猫", "我喜欢猫")


# ----------------------------------------------------------------------------------- right or not


def test_an_exact_match_ignores_whitespace_at_the_ends_alone():
    assert text.exact_match(" yes\n", "yes") == 1
    assert text.exact_match("Yes", "yes") == text.exact_match("y es", "yes") == 0


def test_a_pattern_is_found_anywhere():
    assert text.regex_match("the answer is 18.", r"answer is \d+") == 1
    assert text.regex_match("the answer is 18.", r"^\d+") == 0
    fixed = text.without_reference(functools.partial(text.regex_match, pattern=r"\d"))
    assert score(fixed, "a1") == 1 and score(fixed, "a") == 0
    with pytest.raises(BadRow, match=r"'\(' is no regular expression .*; correct it"):
        text.regex_match("x", "(")


@pytest.mark.parametrize(
    "written, number",
    [
        ("She has 3 apples, then 18.", 18),
        ("#### 1,234,567.50", Fraction("1234567.5")),
        ("1,2,3", 3),
        ("12,34", 34),
        ("1,2345", 2345),
        ("x = -3", -3),
        ("x=\u22123", -3),
        ("+7", 7),
        ("10-3", 3),
        ("10 - 3", 3),
        ("(10)-3", 3),
        (".5", Fraction(1, 2)),
        ("No.5", 5),
        ("-3/4", Fraction(-3, 4)),
        ("007/010", Fraction(7, 10)),
        ("3/4.5", Fraction("4.5")),
        ("6/0", 0),
        ("12/25/2024", 2024),
        ("50%", 50),
        ("18kg", 18),
        ("答案是18元", 18),
        ("$5.00", 5),
        ("1e5", 1),
        ("1 1/2", Fraction(1, 2)),
        (r"\frac{1}{2}", 2),
        ("v1.2.3", None),
        ("1.2.3", Fraction("1.2")),
        ("GPT4", None),
        ("none at all", None),
        ("", None),
        ("9" * 1000, 10**1000 - 1),
        ("9" * 5000, None),
    ],
)
def test_the_last_number_of_a_text(written, number):
    assert text.last_number(written) == number


def test_numbers_are_equal_as_fractions():
    for response in ("0.5", "is .50.", "= 1/2", "2/4", "first 7, then 0.500"):
        assert text.numeric_match(response, "#### 0.5") == 1
    for response in ("", "no number", "-0.5", "0.5 or 1", "5"):
        assert text.numeric_match(response, "0.5") == 0
    assert text.numeric_match("0.33", "1/3") == 0
    with pytest.raises(BadRow, match="the reference 'half' holds no number; give one"):
        text.numeric_match("0.5", "half")


# ------------------------------------------------------------------------------ the response alone


def test_the_length_penalty_rises_in_a_straight_line():
    found = [text.length_penalty("w " * n, free=2, longest=4) for n in range(6)]
    assert found == [0, 0, 0, 0.5, 1, 1]
    assert text.length_penalty("很长的话", free=0, longest=8, unit="characters") == 0.5
    with pytest.raises(ValueError, match="free=4 and longest=4: 0 <= free < longest must hold"):
        text.length_penalty("w", free=4, longest=4)


def test_the_repetition_penalty_is_the_share_of_n_grams_that_came_before():
    assert text.repetition_penalty("a b a b a b", n=2) == pytest.approx(3 / 5)  # ab ba [ab ba ab]
    assert text.repetition_penalty("a b c d") == text.repetition_penalty("a a") == 0
    assert text.repetition_penalty("啊啊啊", n=1, unit="characters") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="n=0: an n-gram has at least 1 word"):
        text.repetition_penalty("a", n=0)


def test_sentiment_is_the_share_of_positive_weight():
    measure = text.lexicon({"Good": 1, "great": 2.0, "bad": -1, "don't": -4})
    assert measure("good, GREAT; bad!") == pytest.approx((1 + 2) / (1 + 2 + 1))
    assert measure("good good bad") == pytest.approx(2 / 3)
    assert measure("goodness") == measure("") == 0.5
    assert measure("Don't.") == 0 and measure("great") == 1


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "weights, message",
    [
        ({}, "the lexicon is empty"),
        ({"very good": 1.0}, "'very good' in the lexicon is not one word"),
        ({"good": float("nan")}, "the weight of 'good' is nan; a weight is finite and not 0"),
        ({"good": 0}, "the weight of 'good' is 0; a weight"),
        ({"good": "high"}, "the weight of 'good' is 'high'; a weight"),
    ],
)
def test_a_faulty_lexicon_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        text.lexicon(weights)


# ----------------------------------------------------------------------------------------- SimiLe

VECTORS = {"a": (1.0, 0.0), "b": (0.0, 2.0), "c": (-1.0, 0.0)}


@pytest.fixture
def vectors(tmp_path):
    """The file of a, b and c, as word2vec writes it: a header, and a space at each end."""
    lines = [f"{word} {x} {y} \n" for word, (x, y) in VECTORS.items()]
    (tmp_path / "vectors.txt").write_text("3 2\n" + "".join(lines))
    return embeddings.from_text(tmp_path / "vectors.txt")


def test_simile_is_the_cosine_of_averages_times_the_length_penalty(vectors):
    simile = functools.partial(text.simile, embeddings=vectors)
    assert simile("a b.", "A b .") == pytest.approx(1)
    cosine = 0.5 / math.hypot(0.5, 1)  # of (1, 0) and the average of a and b
    assert simile("a b", "a") == pytest.approx(math.exp(1 - 2 / 1) ** 0.25 * cosine)
    assert simile("a zebra", "a") == pytest.approx(math.exp(-0.25))  # unknown, but it has a length
    assert simile("c", "a") == simile("a", "b") == 0
    assert simile("zebra", "a") == simile("", "a") == 0


@pytest.mark.parametrize("words, penalty", [(9, 0.973), (8, 0.939), (7, 0.898), (5, 0.779)])
def test_simile_lowers_short_and_long_responses_alike(vectors, words, penalty):
    ten, fewer = " ".join("a" * 10), " ".join("a" * words)
    for pair in ((ten, fewer), (fewer, ten)):
        assert text.simile(*pair, embeddings=vectors) == pytest.approx(penalty, abs=5e-4)


def test_embeddings_of_tokens_come_from_an_array_or_a_model(tmp_path, compile_cache):
    model = tiny.model()
    table = np.asarray(model.weights["embed"]["embedding"])
    np.save(tmp_path / "table.npy", table)
    texts = "zab cd", "Ab"
    ids = [np.frombuffer(x.lower().encode(), np.uint8) for x in texts]
    first, second = (np.mean([table[i] for i in x], axis=0) for x in ids)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    by_hand = max(0, math.exp(1 - 6 / 2) ** 0.25 * cosine)
    assert [tiny.TOKENIZER.encode(x.lower()) for x in texts] == [x.tolist() for x in ids]
    for found in (
        embeddings.from_array(tmp_path / "table.npy", tiny.TOKENIZER),
        embeddings.from_model(model, tiny.TOKENIZER),
    ):
        assert text.simile(*texts, embeddings=found) == pytest.approx(by_hand, rel=1e-5)


def test_words_may_stand_without_a_header_and_the_first_of_equal_ones_counts(tmp_path):
    (tmp_path / "glove.txt").write_text("The 1 2\nthe 3 4\n, 5 6\n")
    found = embeddings.from_text(tmp_path / "glove.txt")
    assert found.units("THE, end") == [0, 2, -1]
    assert found.table.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a 1 2\nb 1\n", r"v.txt:2: 'b 1' is not a word and 2 finite numbers"),
        ("a 1 2\nb 1 x\n", "v.txt:2: 'b 1 x' is not a word and 2 finite"),
        ("2 2\na 1 2\nb 1 nan\n", "v.txt:3: 'b 1 nan' is not a word and 2 finite"),
        ("3 2\na 1 2\n", "v.txt: holds 1 words, but its first line says 3; the file may have been"),
        ("", "v.txt: holds 0 words; the file may have been cut off"),
        (b"3 2\n\xff\xfe\x00", "v.txt: not text in UTF-8 .*word2vec's binary format"),
        (None, "v.txt: no such file; check the path"),
    ],
)
def test_a_faulty_file_of_words_is_named_with_its_line(tmp_path, content, message):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "v.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        embeddings.from_text(tmp_path / "v.txt")


def test_an_array_that_does_not_fit_the_tokenizer_is_refused(tmp_path):
    np.save(tmp_path / "table.npy", np.zeros((10, 3)))
    with pytest.raises(
        ValueError, match=r"table.npy: embeddings of shape \[10, 3\], but the token"
    ):
        embeddings.from_array(tmp_path / "table.npy", tiny.TOKENIZER)
    np.save(tmp_path / "table.npy", np.full((tiny.TOKENIZER.vocab_size, 3), np.nan))
    with pytest.raises(ValueError, match="table.npy: an embedding is not finite"):
        embeddings.from_array(tmp_path / "table.npy", tiny.TOKENIZER)
    (tmp_path / "table.npy").write_text("no array")
    with pytest.raises(ValueError, match="table.npy: not an array of numpy"):
        embeddings.from_array(tmp_path / "table.npy", tiny.TOKENIZER)


# -------------------------------------------------------------------------------- what all share


def metrics():
    """Every metric of a response and a reference, with each of its settings."""
    table = Embeddings(np.eye(3, dtype=np.float32), lambda t: [ord(c) % 4 - 1 for c in t.split()])
    yield from (
        functools.partial(text.sentence_bleu, smoothing=smoothing, effective_order=effective)
        for smoothing, effective in itertools.product(
            ("none", "add-1", "floor", "exp"), (False, True)
        )
    )
    yield from (functools.partial(text.rouge, kind=x) for x in ("rouge1", "rouge2", "rougeL"))
    yield from (text.chrf, text.exact_match, text.numeric_match, text.regex_match)
    yield functools.partial(text.simile, embeddings=table)


METRICS = list(metrics())


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_between_0_and_1_and_1_for_the_reference_itself(metric):
    """A BLEU between 0 and 100 is the same for all responses behind a sigmoid."""
    random.seed(0)
    reference = "b c d b 1 2"
    assert metric(reference, reference) == pytest.approx(1)
    for _ in range(50):
        response = " ".join(random.choices("abcd12", k=random.randint(0, 9)))
        assert 0 <= metric(response, reference) <= 1


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_refuses_an_empty_reference_and_what_is_no_text(metric):
    with pytest.raises(BadRow, match="the reference is empty; a response is compared with what"):
        metric("a", " \n")
    with pytest.raises(ValueError, match="the reference is 18; a metric compares two texts"):
        metric("a", 18)
    with pytest.raises(ValueError, match="the response is None; a metric compares two texts"):
        metric(None, "a")


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "metric, message",
    [
        (functools.partial(text.sentence_bleu, smoothing="add-k"), "smoothing='add-k' is not one"),
        (
            functools.partial(text.sentence_bleu, tokenize="spm"),
            "tokenize='spm' is not one of '13a",
        ),
        (
            functools.partial(text.rouge, kind="rougeLsum"),
            "kind='rougeLsum' is not one of 'rouge1'",
        ),
    ],
)
def test_a_setting_that_is_none_is_refused_with_the_choices(metric, message):
    with pytest.raises(ValueError, match=message):
        metric("a", "a")


# ------------------------------------------------------------------------- a metric as a reward


def test_a_metric_is_a_reward_against_a_field_or_the_completion():
    answer = text.against(text.exact_match, field="answer")
    assert score(answer, "yes", extra={"answer": "yes"}) == 1
    assert score(answer, "no", extra={"answer": "yes"}) == 0
    assert score(answer, "no", extra={"answer": ["yes", "no"]}) == 1  # several references
    completion = text.against(text.exact_match)
    assert score(completion, "b", responses=("a", "b"), ranks=(1, 0)) == 1
    assert score(completion, "a", responses=("a", "b"), ranks=(1, 0)) == 0
    assert score(completion, "b", responses=("a", "b")) == 1  # equally good
    rows = [Example("p", extra={"answer": x}) for x in "ab"]
    assert answer(["p", "p"], ["a", "a"], rows) == [1, 0]


@pytest.mark.parametrize(
    "field, row, message",
    [
        ("answer", {}, "'answer' is missing; .* its other fields are none"),
        ("answer", {"extra": {"id": 1, "gold": "x"}}, "'answer' is missing.*are 'id', 'gold'"),
        ("answer", {"extra": {"answer": 18}}, "'answer' must be a string, got 18; a reference is"),
        ("answer", {"extra": {"answer": " "}}, "'answer' is empty"),
        ("answer", {"extra": {"answer": []}}, "'answer' is an empty list"),
        ("answer", {"extra": {"answer": ["a", None]}}, r"'answer\[1\]' must be a string, got None"),
        ("answer", {"extra": {"answer": "half"}}, "the reference 'half' holds no number"),
        (None, {"extra": {"gold": "x"}}, "there is no completion; name the field .* are 'gold'"),
    ],
)
def test_a_row_without_its_reference_is_named_with_its_fields(field, row, message):
    reward = text.against(text.numeric_match, field)
    with pytest.raises(BadRow, match=f"^numeric_match, the row of the prompt 'p': {message}"):
        score(reward, "1", **row)


def test_a_reward_of_text_has_a_name_and_can_be_sent_to_another_process():
    second = functools.partial(text.rouge, kind="rouge2")
    rewards = {
        "rouge against 'answer'": text.against(second, "answer"),
        "chrf against the completion": text.against(text.chrf),
        "repetition_penalty": text.without_reference(text.repetition_penalty),
        "lexicon": text.without_reference(text.lexicon({"cat": 1.0})),
    }
    row = {"extra": {"answer": CAT}, "responses": (CAT,)}
    for name, reward in rewards.items():
        sent = pickle.loads(pickle.dumps(reward))
        assert host.name_of(reward) == host.name_of(sent) == name
        assert score(sent, "the cat the cat the", **row) == score(
            reward, "the cat the cat the", **row
        )
