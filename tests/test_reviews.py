"""The synthetic task of tasks/reviews.py: what its gold score, labels and files promise."""

import json
import math
import random

import pytest

from rlhf_jax.tasks import review_grammar, reviews

CAMERA = "Write a review of the Nova camera.\n"
FILM = "Is The Silver Harbour any good?\n"
OPENING = "I used the Nova camera six times."
STRENGTH = "The battery lasts nine hours."
WEAKNESS = "But the manual skips two steps."
VERDICT = "Buy it for long trips."
IDEAL = (OPENING, STRENGTH, WEAKNESS, VERDICT)
COUNTS = dict(num_demonstrations=2000, num_comparisons=500, num_eval_comparisons=3000)


def score(*sentences, prompt=CAMERA):
    return reviews.gold(prompt, " ".join(sentences))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return reviews.make(7, tmp_path_factory.mktemp("reviews"), **COUNTS)


@pytest.fixture(scope="module")
def drawn():
    """Twenty thousand demonstrations as (prompt, sentences, gold)."""
    rng = random.Random("test")
    prompts, _ = reviews.split_prompts(3)
    rows = []
    for i in range(20000):
        prompt = prompts[i % len(prompts)]
        sentences = reviews.review(rng, review_grammar.subject(prompt)[0])
        rows.append((prompt, sentences, score(*sentences, prompt=prompt)))
    return rows


# ------------------------------------------------------------------------------- the gold score


def test_the_module_docstring_quotes_scores_that_are_true():
    good, bad = (
        "I used the Nova camera six times. The battery lasts nine hours. "
        "But the manual skips two steps. Buy it for long trips.",
        "Wow, I bought it on Monday. The battery is very very nice. It came in a box. "
        "Maybe try it one day.",
    )
    words = " ".join(reviews.__doc__.split())
    assert all(part in words for part in (CAMERA.strip(), f"1.00 {good}", f"0.19 {bad}"))
    assert reviews.gold(CAMERA, good) == 1.0
    assert reviews.gold(CAMERA, bad) == 0.19


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # (a review that differs from the ideal one in the property named, its gold)
        ((OPENING.replace("the Nova camera", "it"), STRENGTH, WEAKNESS, VERDICT), 0.88),  # unnamed
        ((STRENGTH, OPENING, WEAKNESS, VERDICT), 0.94),  # named late
        ((OPENING.replace("Nova", "Vega"), STRENGTH, WEAKNESS, VERDICT), 0.78),  # a wrong item
        ((OPENING, "The battery is good.", WEAKNESS, VERDICT), 0.86),  # one vague judgement
        ((OPENING, "The battery is good.", "The case is bad.", VERDICT), 0.72),  # both vague
        ((OPENING, STRENGTH, "The battery died in two hours.", VERDICT), 0.86),  # one aspect only
        ((OPENING, STRENGTH, "The case survived two falls.", VERDICT), 0.86),  # praise only
        ((OPENING, WEAKNESS, VERDICT), 0.72),  # blame only, one fact
        ((OPENING, STRENGTH, WEAKNESS, "Maybe try it one day."), 0.89),  # hedged
        ((OPENING, STRENGTH, WEAKNESS, "That is all for now."), 0.78),  # no verdict
        ((OPENING, STRENGTH, VERDICT, WEAKNESS), 0.78),  # the verdict is not the end
        (
            (OPENING, STRENGTH, WEAKNESS, "Skip it if you camp.", VERDICT),
            0.68,
        ),  # two verdicts, long
        ((OPENING, STRENGTH, WEAKNESS, f"Wow, buy{VERDICT[3:]}"), 0.92),  # one filler
        ((f"{OPENING[:-1]}!!!", STRENGTH, WEAKNESS, f"Wow, buy{VERDICT[3:]}"), 0.84),  # two
        ((OPENING, "It came in a box.", STRENGTH, WEAKNESS, VERDICT), 0.90),  # a fifth sentence
        ((OPENING, STRENGTH, STRENGTH, VERDICT), 0.62),  # repeated for the weakness
        ((OPENING, STRENGTH, "The manual two steps.", VERDICT), 0.57),  # ungrammatical weakness
        ((OPENING, STRENGTH, "The plot hides two clues.", VERDICT), 0.62),  # another domain
    ],
)
def test_each_property_moves_the_gold_score_by_its_documented_amount(response, expected):
    assert score(*IDEAL) == 1.0
    assert score(*response) == expected


def test_a_film_is_judged_by_the_sentences_of_films():
    film = (
        "I saw The Silver Harbour on Friday.",
        "The cast learned two dances.",
        "The plot stops for six hours.",
        "Skip it if you hate jokes.",
    )
    assert score(*film, prompt=FILM) == 1.0
    assert score(*film, prompt=FILM.replace("Silver", "Golden")) == 0.78
    assert score(*film) == 0.0 == score(*IDEAL, prompt=FILM)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n ",
        ".",
        "!!!",
        ". . . . !",
        "\x00\ufffd<pad> \u00e9\u00e8",
        "Nova camera battery lasts nine hours manual skips buy it for long trips recommend",
        "the Nova camera the Nova camera the Nova camera. battery. case. Buy it.",
        "the the Nova. lasts lasts. Buy. Buy. Buy.",
        "Write a review of the Nova camera.",
        "The battery. The case. The charger. The switch. The manual. Buy it for long trips.",
    ],
)
def test_empty_text_garbage_and_heaps_of_keywords_score_nothing(response):
    assert reviews.gold(CAMERA, response) == 0.0
    assert not review_grammar.grammatical(response)


def test_random_words_of_the_task_score_almost_nothing(drawn):
    rng = random.Random("words")
    words = [word for _, sentences, _ in drawn[:500] for word in " ".join(sentences).split()]
    garbage = [" ".join(rng.choices(words, k=24)) for _ in range(500)]
    golds = [reviews.gold(CAMERA, text) for text in garbage]
    assert all(0.0 <= value <= 1.0 for value in golds)
    assert sum(golds) / len(golds) < 0.001


def test_one_sentence_said_many_times_earns_no_more_than_once():
    for sentence in IDEAL:
        once = score(sentence)
        assert all(score(*[sentence] * count) <= once for count in (2, 3, 5))


def test_every_true_sentence_of_the_grammar_at_once_scores_less_than_a_review():
    facts = review_grammar.FACTS["product"].items()
    heap = [f"The {name} {good}.".format(number="two") for name, (good, _) in facts]
    assert review_grammar.grammatical(" ".join(heap))
    assert score(OPENING, *heap, WEAKNESS, VERDICT) <= 0.6


def test_a_prompt_that_names_no_item_is_refused():
    with pytest.raises(ValueError, match="'Hello' names no item; .* take prompts from make"):
        reviews.gold("Hello", "It came in a box.")


# ------------------------------------------------------------------------------- the recogniser


@pytest.mark.parametrize(
    ("sentence", "accepted"),
    [
        ("It came in a box.", True),
        ("Wow, it came in a box!!!", True),
        ("But the case is very very poor.", True),
        ("I saw The Last Train with children.", True),
        ("wow, it came in a box.", False),
        ("Wow, It came in a box.", False),
        ("It came in a box", False),
        ("It came in a box!", False),
        ("It came in a box..", False),
        ("It came in box.", False),
        ("The battery lasts very very nine hours.", False),
        ("That is very very all for now.", False),
        ("The plot lasts nine hours.", False),
        ("I saw the Nova camera on Friday.", False),
        ("I used The Last Train six times.", False),
        ("I used {item} {number} times.", False),
    ],
)
def test_the_recogniser_knows_sentences_written_by_hand(sentence, accepted):
    assert review_grammar.grammatical(sentence) is accepted


def test_grammatical_wants_one_to_five_sentences_parted_by_single_spaces():
    assert review_grammar.grammatical(" ".join([STRENGTH] * 5))
    assert not review_grammar.grammatical(" ".join([STRENGTH] * 6))
    assert not review_grammar.grammatical(STRENGTH + VERDICT)
    assert not review_grammar.grammatical(f"{STRENGTH}  {VERDICT}")
    assert not review_grammar.grammatical(f"{STRENGTH}\n{VERDICT}")


def test_every_demonstration_is_grammatical_and_loses_nothing_to_costs(drawn):
    for prompt, sentences, value in drawn:
        text = " ".join(sentences)
        assert review_grammar.grammatical(text) and review_grammar.split(text) == sentences
        assert 2 <= len(sentences) <= 4 and 0.0 <= value <= 1.0
        assert min(reviews.properties(prompt, text).values()) >= 0


def test_corruptions_are_rejected_or_cost_gold(drawn):
    """Broken text (3 of the 5 damages) does not parse; a repetition or a wrong item does parse."""
    rng = random.Random("damage")
    rejected = lower = 0
    for prompt, sentences, value in drawn[:5000]:
        text = reviews.corrupt(rng, review_grammar.subject(prompt)[0], sentences)
        rejected += not review_grammar.grammatical(text)
        lower += reviews.gold(prompt, text) < value
    assert 0.57 < rejected / 5000 < 0.63  # measured 0.60: all but a few of the three fifths
    assert lower / 5000 > 0.85  # the rest had nothing left to lose


# ---------------------------------------------------------------------------- the distributions


def test_demonstrations_are_of_mixed_quality(drawn):
    golds = [value for _, _, value in drawn]
    mean = sum(golds) / len(golds)
    spread = math.sqrt(sum((value - mean) ** 2 for value in golds) / len(golds))
    assert 0.40 < mean < 0.50 and 0.15 < spread < 0.25
    assert len(set(golds)) > 30 and max(golds) == 1.0


def test_the_best_score_is_a_few_nats_from_the_demonstrations(drawn):
    """ideal_kl is -log of the chance of gold 1, which is counted here."""
    chance = math.exp(-reviews.ideal_kl())
    counted = sum(value == 1.0 for _, _, value in drawn) / len(drawn)
    assert 3 < reviews.ideal_kl() < 8
    assert abs(counted - chance) < 3 * math.sqrt(chance * (1 - chance) / len(drawn))


def test_three_nats_are_enough_for_a_mean_gold_of_nine_tenths(drawn):
    """The tilted distribution p exp(gold / b) is the best policy for its KL; here b = 0.06."""
    golds = [value for _, _, value in drawn]
    weights = [math.exp(value / 0.06) for value in golds]
    mean = sum(w * value for w, value in zip(weights, golds)) / sum(weights)
    kl = mean / 0.06 - math.log(sum(weights) / len(weights))
    assert mean > 0.9 and kl < 3.3


def test_labels_agree_with_gold_as_often_as_the_noise_says(task):
    rows = read(task.comparisons_eval)
    gaps = [
        reviews.gold(row["prompt"], row["chosen"]) - reviews.gold(row["prompt"], row["rejected"])
        for row in rows
    ]
    chances = [1 / (1 + math.exp(-reviews.SHARPNESS * abs(gap))) for gap in gaps]
    expected = sum(chances) / len(chances)
    actual = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)
    error = math.sqrt(sum(p * (1 - p) for p in chances)) / len(chances)
    assert task.best_accuracy == pytest.approx(expected, abs=1e-12)
    assert task.realised_accuracy == pytest.approx(actual, abs=1e-12)
    assert 0.73 < expected < 0.80
    assert abs(actual - expected) < 3 * error


def test_rankings_of_four_are_plackett_luce():
    """The chance that the first of a ranking is the best of it is exp(s g) / sum exp(s g)."""
    _, prompts = reviews.split_prompts(0)
    rows = reviews.compare(random.Random("four"), prompts, 3000, 4, 5.0)
    expected, error, actual = 0.0, 0.0, 0
    for row in rows:
        assert len(set(row.responses)) == 4
        weights = [math.exp(5.0 * value) for value in row.golds]
        chance = weights.count(max(weights)) * max(weights) / sum(weights)
        expected, error = expected + chance, error + chance * (1 - chance)
        actual += row.golds[0] == max(row.golds)
    assert abs(actual - expected) < 3 * math.sqrt(error)
    accuracy = reviews.best_reachable(rows, 5.0)
    assert abs(reviews.agreement(rows) - accuracy) < 3 * 0.5 / math.sqrt(3 * len(rows))


# ------------------------------------------------------------------------------------- the files


def test_files_hold_the_promised_rows(task):
    demonstrations = read(task.demonstrations)
    assert len(demonstrations) == 2000
    assert all(set(row) == {"prompt", "completion"} for row in demonstrations)
    mean = sum(
        task.gold(**dict(prompt=r["prompt"], response=r["completion"])) for r in demonstrations
    )
    assert task.demonstration_gold == pytest.approx(mean / 2000)
    for path, count in ((task.comparisons, 500), (task.comparisons_eval, 3000)):
        rows = read(path)
        assert len(rows) == count
        assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
        assert all(row["chosen"] != row["rejected"] for row in rows)
    prompts, prompts_eval = read(task.prompts), read(task.prompts_eval)
    assert (len(prompts), len(prompts_eval)) == (384, 128)
    assert all(set(row) == {"prompt"} and row["prompt"].endswith("\n") for row in prompts)
    for row in demonstrations:
        assert row["prompt"].endswith("\n") and row["completion"] == row["completion"].strip()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_and_held_out_prompts_share_words_but_no_item(seed):
    train, held_out = reviews.split_prompts(seed)
    assert len(set(train)) == 384 and len(set(held_out)) == 128
    known, new = (
        {review_grammar.subject(prompt)[0] for prompt in part} for part in (train, held_out)
    )
    assert not known & new and len(known | new) == 128
    assert {word for item in new for word in item.split()} <= {
        word for item in known for word in item.split()
    }


def test_files_keep_training_and_held_out_prompts_apart(task):
    train = {row["prompt"] for row in read(task.prompts)}
    held_out = {row["prompt"] for row in read(task.prompts_eval)}
    for path in (task.demonstrations, task.comparisons):
        assert {row["prompt"] for row in read(path)} <= train
    assert {row["prompt"] for row in read(task.comparisons_eval)} <= held_out


def test_a_seed_fixes_every_byte_and_another_seed_changes_them(tmp_path):
    small = dict(num_demonstrations=50, num_comparisons=50, num_eval_comparisons=50)
    a, b, c = (reviews.make(s, tmp_path / n, **small) for s, n in ((1, "a"), (1, "b"), (2, "c")))
    for name in ("demonstrations", "comparisons", "comparisons_eval", "prompts", "prompts_eval"):
        data = [getattr(task, name).read_bytes() for task in (a, b, c)]
        assert data[0] == data[1] != data[2]
    longer = reviews.make(1, tmp_path / "d", **{**small, "num_comparisons": 60})
    assert longer.comparisons.read_bytes().startswith(a.comparisons.read_bytes())
    assert longer.comparisons_eval.read_bytes() == a.comparisons_eval.read_bytes()


def test_rankings_are_written_best_first(tmp_path):
    counts = dict(num_demonstrations=5, num_comparisons=20, num_eval_comparisons=5)
    task = reviews.make(0, tmp_path, responses_per_prompt=4, num_prompts=10, **counts)
    assert len(read(task.prompts)) == 10
    for row in read(task.comparisons):
        assert row["ranks"] == [0, 1, 2, 3] and len(set(row["responses"])) == 4


@pytest.mark.parametrize(
    ("field", "value"), [("num_prompts", 385), ("responses_per_prompt", 1), ("num_comparisons", 0)]
)
def test_counts_out_of_range_are_refused_by_name(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}: {value} is not in "):
        reviews.make(0, tmp_path, **{field: value})


def test_a_bpe_of_512_entries_keeps_responses_within_36_tokens(task):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = read(task.demonstrations)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=512, show_progress=False)
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)

    def lengths(texts):
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]

    completions = lengths([row["completion"] for row in rows])
    compared = read(task.comparisons) + read(task.comparisons_eval)
    judged = lengths([row[side] for row in compared for side in ("chosen", "rejected")])
    prompts = lengths([row["prompt"] for row in read(task.prompts) + read(task.prompts_eval)])
    assert max(completions) <= 36 and max(judged) <= 36 and max(prompts) <= 14
    assert sum(completions) / len(completions) < 26
