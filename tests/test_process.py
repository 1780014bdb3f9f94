"""Process rewards: rows of steps, a scorer that learns them, PPO and best of n on its scores."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import sharding
from rlhf_jax.algorithms import best_of_n, ppo, ppo_variants, process_reward
from rlhf_jax.data import batches, builders, formats, mixing
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.schema import Example
from rlhf_jax.data.tokenizers import PLAIN_TEMPLATE, byte_tokenizer, from_folder
from rlhf_jax.models import heads
from rlhf_jax.rewards import process
from rlhf_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("caches")

BYTES = byte_tokenizer()
NEWLINE, EOS, PAD = 10, 257, 256
MARKS = process.Marks((NEWLINE,), (EOS,))
ONE_MARK = process.Marks(())
ROW = {"prompt": "1+2?", "completions": ["1+2=3", "so 4"], "labels": [True, False]}
BALLS = {
    "prompt": "Tom has 3 red balls.",
    "completions": ["He gets 2 more.", "Now he has 6 balls, it's fun!"],
    "labels": [True, False],
}


def one_batch(examples):
    (batch,) = Loader(examples, len(examples), shuffle=False).epoch_batches()
    return batch


def ids_of(text):
    return list(text.encode())


# ----------------------------------------------------------------------------------- rows of steps

# PRMTrainer.tokenize_row(row, tokenizer, separator, None, None, False, False) of TRL 1.10.0 with
# transformers 5.24: the ids, and where labels are not -100. The tokenizer of the first two is the
# folder that `byte_tokenizer().save` writes.
# fmt: off
BYTES_BY_LINES = ([49, 43, 50, 63, 49, 43, 50, 61, 51, 10, 115, 111, 32, 52, 10], {9: 1, 14: 0})
BYTES_BY_SEMICOLONS = (
    [49, 43, 50, 63, 49, 43, 50, 61, 51, 59, 32, 115, 111, 32, 52, 59, 32], {10: 1, 16: 0}
)
STORIES = (
    [1, 274, 287, 300, 419, 410, 472, 352, 266, 268, 388, 419, 426, 346, 298, 316, 419, 410, 479,
     284, 414, 276, 426, 410, 13, 410, 458, 327, 281, 300, 419, 410, 490, 268, 388, 419, 432, 312,
     439, 419, 272, 379, 443, 410, 13], {24: 1, 44: 0}
)
GPT2 = (
    [50256, 13787, 468, 513, 2266, 11333, 13, 1544, 3011, 362, 517, 13, 198, 3844, 339, 468, 718,
     11333, 11, 340, 338, 1257, 0, 198], {12: 1, 23: 0}
)
# fmt: on


def assert_tokenised(batch, ids, labels, length):
    marks, wanted = np.zeros(length), np.zeros(length)
    for place, label in labels.items():
        marks[place], wanted[place] = 1, label
    assert batch.tokens[0, : len(ids)].tolist() == ids
    assert batch.attend[0].tolist() == [1] * len(ids) + [0] * (length - len(ids))
    np.testing.assert_array_equal(batch.marks[0], marks)
    np.testing.assert_array_equal(batch.labels[0], wanted)


def test_tokens_and_labels_are_those_of_trl():
    batch = one_batch(batches.steps([ROW], BYTES, 4, 14))
    assert_tokenised(batch, *BYTES_BY_LINES, 18)
    assert (batch.tokens[0, 15:] == PAD).all()
    batch = one_batch(batches.steps([ROW], BYTES, 4, 14, separator="; "))
    assert_tokenised(batch, *BYTES_BY_SEMICOLONS, 18)


@pytest.mark.parametrize(
    ("name", "expected", "added"),
    [
        ("models/stories260K", STORIES, 0),
        # TRL prepends a BOS that this tokenizer has but does not prepend itself.
        ("tokenizers/gpt2", GPT2, 1),
    ],
)
def test_real_tokenizers_give_trls_ids(real_data, name, expected, added):
    ids, labels = expected
    batch = one_batch(batches.steps([BALLS], from_folder(real_data / name), 16, 48))
    labels = {place - added: label for place, label in labels.items()}
    assert_tokenised(batch, ids[added:], labels, 64)


def test_labels_may_be_soft_and_separators_empty():
    row = {"prompt": "p", "completions": ["ab", "c"], "labels": [0.25, 1]}
    examples = batches.steps([row], BYTES, 1, 3, separator="")
    batch = one_batch(examples)
    assert batch.tokens[0].tolist() == ids_of("pabc")
    assert batch.labels[0].tolist() == [0, 0, 0.25, 1]
    assert examples.kind is batches.Steps and batches.real_tokens(batch) == 4


def test_a_prompt_of_messages_is_rendered_as_the_sampler_is_fed():
    chat = BYTES.with_template(PLAIN_TEMPLATE)
    row = ROW | {"prompt": [{"role": "user", "content": "hi"}]}
    batch = one_batch(batches.steps([row], chat, 32, 16))
    text = BYTES.decode(batch.tokens[0][batch.attend[0] > 0])
    assert text == "user:\nhi\nassistant:\n1+2=3\nso 4\n"
    assert batch.marks[0].nonzero()[0].tolist() == [25, 30]


def test_steps_are_shown_with_their_labels():
    examples = batches.steps([ROW | {"labels": [1, 0.5]}], BYTES, 4, 14)
    assert batches.show(examples[0], BYTES) == "1+2?1+2=3\n⟦1⟧so 4\n⟦0.5⟧"


def test_rows_over_a_limit_are_dropped_and_counted_and_the_last_batch_is_padded():
    rows = [ROW, ROW | {"prompt": "1+2=?"}, ROW | {"completions": ["1+2=3", "so 45"]}, ROW]
    rows.append(ROW | {"labels": [1, 1]})
    examples = batches.steps(rows, BYTES, 4, 11)
    wanted = {batches.LONG_PROMPT: 1, batches.LONG_RESPONSE: 1, batches.DUPLICATE: 1}
    assert examples.counts.dropped == wanted and len(examples) == 2
    first, last = Loader(examples, 1), Loader(examples, 3)
    assert len(first.epoch_batches()) == 2
    (batch,) = last.epoch_batches()
    assert batches.real_rows(batch) == 2
    assert batch.marks[2].sum() == batch.attend[2].sum() == 0


def test_a_file_of_steps_is_read_and_its_prompts_serve_online(tmp_path):
    file = tmp_path / "steps.jsonl"
    file.write_text("\n".join(json.dumps(ROW | {"prompt": x, "id": 7}) for x in ("ab", "cd")))
    rows = builders.load(file)
    batch = one_batch(batches.steps(rows, BYTES, 4, 12))
    assert batch.labels.sum() == 2 and batch.marks.sum() == 4
    prompts = batches.prompts(rows, BYTES, 4)
    assert prompts.sources[0].steps == ("1+2=3", "so 4") and prompts.sources[0].labels == (1, 0)
    assert prompts.sources[0].extra == {"id": 7}
    both = mixing.mix([(batches.steps(rows, BYTES, 4, 12), 1)] * 2)
    assert len(both) == 4 and both.kind is batches.Steps


FAULTS = [
    ({"labels": [True]}, "2 'completions' but 1 'labels'; give each step its label"),
    ({"completions": [], "labels": []}, "'completions' holds no step; a row of steps has 'prompt'"),
    ({"completions": ["a", " "]}, r"'completions\[1\]' is empty; fill it in or remove the row; a"),
    ({"completions": ["a", 3]}, r"'completions\[1\]' must be a string, got 3; a row of steps has"),
    ({"completions": "ab"}, "'completions' must be a list, got 'ab'; a row of steps has"),
    ({"labels": True}, "'labels' must be a list, got True; a row of steps has"),
    ({"labels": [True, "yes"]}, r"'labels\[1\]' must be a finite number, got 'yes'; a row of"),
    ({"labels": [True, None]}, r"'labels\[1\]' must be a finite number, got None; a row of steps"),
    ({"labels": [float("nan"), 1]}, r"'labels\[0\]' must be a finite number, got nan; a row of"),
    ({"labels": [True, -1]}, r"'labels\[1\]' must lie between 0 and 1, got -1; a row of steps has"),
    ({"prompt": ""}, "'prompt' is empty; fill it in or remove the row; a row of steps has"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_faulty_row_is_one_sentence_with_its_place_and_remedy(change, message):
    with pytest.raises(ValueError) as caught:
        batches.steps([ROW, ROW | change], BYTES, 4, 16)
    assert re.match(f"row 2: {message}", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    kept = batches.steps([ROW, ROW | change], BYTES, 4, 16, on_bad_row="drop")
    assert kept.counts.dropped == {batches.FAULTY: 1}


def test_other_rows_are_no_steps_and_steps_are_no_other_rows():
    with pytest.raises(ValueError, match=r"^row 1: 'completions' is missing; a row of steps has"):
        batches.steps([{"prompt": "p", "completion": "a"}], BYTES, 4, 8)
    with pytest.raises(ValueError, match=r"^row 1: 'labels' is missing; a row of steps has"):
        batches.steps([{"prompt": "p", "completions": ["a"]}], BYTES, 4, 8)
    for build in (batches.demonstrations, batches.comparisons, batches.scored):
        with pytest.raises(ValueError, match=r"^row 1: "):
            build([ROW], BYTES, 8, 16)
    # Without labels they are a part of a prompt's row that is kept as it is.
    row = {"prompt": "p", "completions": ["a"]}
    assert formats.read(row) == Example("p", extra={"completions": ["a"]})


def test_a_loader_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"takes steps, but the loader draws Comparisons; build "):
        process_reward.run(process_reward.Config(), tiny.model(), tiny.comparisons())


# ---------------------------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def scorer():
    return heads.init_scorer(tiny.model(), jax.random.key(7))


def rows_of_steps(count=8, seed=0):
    """Steps of two letters, right where the letters are equal."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        steps = ["".join(rng.choice(list("abcd"), 2)) for _ in range(4)]
        steps = [x if rng.random() < 0.6 else x[0] * 2 for x in steps]
        labels = [x[0] == x[1] for x in steps]
        rows.append({"prompt": f"{i}?", "completions": steps, "labels": labels})
    return rows


def toy(count, seed, batch_size):
    return Loader(batches.steps(rows_of_steps(count, seed), BYTES, 4, 12), batch_size, seed)


def test_loss_and_gradient_are_those_of_torchs_cross_entropy_of_two_classes(monkeypatch):
    """The logits of TRL's two classes are any whose difference is our score."""
    torch = pytest.importorskip("torch", reason="needs torch, an optional extra, as an oracle")
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(3, 6)).astype(np.float32) * 4
    marks = (rng.random((3, 6)) < 0.5).astype(np.float32)
    shift = torch.tensor(rng.normal(size=(3, 6)).astype(np.float32))
    monkeypatch.setattr(process_reward, "score_batch", lambda scorer, *_: scorer)
    config = process_reward.Config()
    attend = jnp.ones((3, 6), jnp.int32)
    hard = (rng.random((3, 6)) < 0.5).astype(np.float32) * marks
    soft = rng.random((3, 6)).astype(np.float32) * marks

    for labels in (hard, soft):
        batch = batches.Steps(attend, attend, jnp.asarray(marks), jnp.asarray(labels), attend)

        def ours(scores, batch):
            return process_reward.loss(config, {"scorer": scores}, batch)[0]

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(scores), batch)
        theirs = torch.tensor(scores, requires_grad=True)
        logits = torch.stack([shift, shift + theirs], dim=-1)
        at = torch.tensor(marks) > 0
        if labels is hard:  # as TRL gives them: the class, or -100
            target = torch.where(at, torch.tensor(labels), -100.0).long()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        else:
            target = torch.stack([1 - torch.tensor(labels), torch.tensor(labels)], dim=-1)
            loss = torch.nn.functional.cross_entropy(logits[at], target[at])
        loss.backward()
        assert float(value) == pytest.approx(float(loss.detach()), rel=1e-6)
        np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)


def test_the_loss_reads_the_scorer_at_the_ends_of_steps(scorer):
    batch = jax.tree.map(jnp.asarray, toy(8, 0, 8).batch(0))
    config = process_reward.Config(batch_size=8)
    value, metrics = process_reward.loss(config, {"scorer": scorer}, batch)
    # The text up to the end of each step, scored as a whole sequence.
    rows, ends = np.nonzero(np.asarray(batch.tokens) == NEWLINE)
    tokens = batch.tokens[rows]
    attend = (jnp.arange(tokens.shape[1]) <= ends[:, None]).astype(jnp.int32)
    scores = np.asarray(heads.sequence_scores(scorer, tokens, attend), np.float64)
    labels = np.asarray(batch.tokens)[rows, ends - 1] == np.asarray(batch.tokens)[rows, ends - 2]
    nats = np.log1p(np.exp(np.where(labels, -scores, scores)))
    right = (scores > 0) == labels
    assert len(nats) == 32 and float(metrics["num_marks"]) == 32
    assert float(value) == pytest.approx(np.mean(nats), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right))


LEARNING = process_reward.Config(
    num_steps=60, batch_size=32, optimizer=dataclasses.replace(tiny.ADAM, learning_rate=1e-2)
)


@functools.cache
def learned_scorer():
    config = dataclasses.replace(LEARNING, eval_every=60)
    return process_reward.run(
        config, tiny.model(), toy(200, 1, 32), held_out=toy(50, 2, 32), runtime=tiny.runtime()
    )


def test_a_scorer_learns_which_steps_are_right():
    result = learned_scorer()
    last = result.history[-1]
    assert last["eval/accuracy"] > 0.97 and last["eval/accuracy_low"] > 0.9
    assert last["eval/steps"] == 200 and 0.4 < last["eval/base_rate"] < 0.7
    assert last["eval/loss"] < 0.15 < 0.6 < result.history[0]["loss"]


def test_held_out_figures_are_those_of_a_count_by_hand(scorer):
    loader = toy(10, 3, 8)  # the last batch is padded
    found = process_reward.evaluate(LEARNING, scorer, loader, mesh=tiny.mesh())
    batch = one_batch(loader.examples)
    scores = np.asarray(process.token_scores(scorer, batch.tokens, batch.attend))
    at = batch.marks > 0
    right = (scores[at] > 0) == (batch.labels[at] > 0.5)
    nats = np.log1p(np.exp(np.where(batch.labels[at] > 0.5, -scores[at], scores[at])))
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["base_rate"] == pytest.approx(batch.labels[at].mean())
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert found["steps"] == 40


def test_neither_mesh_nor_micro_batches_change_a_figure(scorer):
    def figures(name, micro_batches=1):
        mesh = tiny.mesh(name)
        config = dataclasses.replace(LEARNING, micro_batches=micro_batches)
        placed = sharding.place(mesh, scorer)
        return process_reward.evaluate(config, placed, toy(12, 1, 32), mesh=mesh)

    plain = figures("1x1x1")
    assert figures("2x2x2") == pytest.approx(plain, rel=1e-5)
    assert figures("1x8x1", micro_batches=4) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_no_step_of_training():
    config = dataclasses.replace(LEARNING, num_steps=2, batch_size=8)
    plain, meshed = (
        process_reward.run(config, tiny.model(name), toy(12, 1, 8), runtime=tiny.runtime(name))
        for name in ("1x1x1", "2x2x2")
    )
    for key in ("loss", "grad_norm", "accuracy"):
        values = [[line[key] for line in x.history] for x in (plain, meshed)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_a_plan_knows_the_programs_of_a_run(called_programs):
    mesh, config = tiny.mesh(), dataclasses.replace(LEARNING, num_steps=2, eval_every=2)
    stage = process_reward.programs(config, tiny.model(), 16, mesh)
    data = toy(40, 1, 32)
    process_reward.run(config, tiny.model(), data, held_out=data, runtime=tiny.runtime())
    assert called_programs.called == called_programs.of(stage.programs)


# ---------------------------------------------------------------------------- marks and reductions


def responses(*texts, prompt="\n?", width=10):
    """Tokens, attention mask and mask of responses; "$" is EOS."""
    tokens = np.full((len(texts), len(prompt) + width), PAD)
    mask = np.zeros(tokens.shape, np.float32)
    for b, text in enumerate(texts):
        ids = [EOS if x == "$" else ord(x) for x in text]
        tokens[b, : len(prompt)] = ids_of(prompt)
        tokens[b, len(prompt) :][: len(ids)] = ids
        mask[b, len(prompt) :][: len(ids)] = 1
    attend = mask.copy()
    attend[:, : len(prompt)] = 1
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(attend, jnp.int32), jnp.asarray(mask)


TEXTS = ("ab\nc\n$", "ab\nc$", "ab\nc", "abc$", "a\n\nb", "$", "\n$")


def marked(marks):
    tokens, _, mask = responses(*TEXTS)
    found = np.asarray(process.step_marks(marks, tokens, mask))
    return ["".join(".^"[int(x)] for x in row[2:]).rstrip(".") for row in found]


def test_marks_are_at_the_ends_of_steps_and_of_the_response():
    by_eos = ["..^.^", "..^.^", "..^^", "...^", ".^^^", "^", "^"]
    assert marked(MARKS) == by_eos
    # Without EOS ids the EOS after the end of a step counts as a step of its own.
    assert marked(process.Marks((NEWLINE,))) == ["..^.^^", *by_eos[1:6], "^^"]
    assert marked(ONE_MARK) == [".....^", "....^", "...^", "...^", "...^", "^", ".^"]


def test_the_prompt_has_no_marks_and_neither_has_an_empty_response():
    tokens, _, mask = responses("a\n", "")
    found = np.asarray(process.step_marks(MARKS, tokens, mask))
    assert found[:, :2].sum() == 0 and found[1].sum() == 0


def test_reductions_by_hand():
    p = jnp.asarray([[0.9, 0.5, 0.8, 0.1], [0.2, 0.3, 0.4, 0.6], [np.nan, 0.5, np.nan, np.nan]])
    marks = jnp.asarray([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]], jnp.float32)
    for reduce, wanted in (
        (process.least, [0.8, 0.2, 0.5]),
        (process.mean, [0.85, 0.375, 0.5]),
        (process.last, [0.8, 0.6, 0.5]),
        (process.product, [0.72, 0.0144, 0.5]),
    ):
        np.testing.assert_allclose(reduce(p, marks), wanted, rtol=1e-6)
    none = jnp.zeros((3, 4))
    found = [float(f(p, none)[0]) for f in (process.least, process.mean, process.last)]
    assert found == [1, 0, 0] and float(process.product(p, none)[0]) == 1


def test_the_score_of_a_response_is_reduced_from_those_of_its_steps(scorer):
    rows = responses(*TEXTS)
    probabilities = 1 / (1 + np.exp(-np.asarray(process.token_scores(scorer, *rows[:2]))))
    for reduce, by_hand in ((process.least, np.min), (process.mean, np.mean)):
        score = process.score(MARKS, reduce)
        found = score(scorer, *rows)
        places = [[i for i, x in enumerate(row) if x == "^"] for row in marked(MARKS)]
        wanted = [by_hand(p[2:][at]) for p, at in zip(probabilities, places)]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert process.score(process.Marks((NEWLINE,), (EOS,)), reduce) is score
    # Of one step, it is that of the whole sequence.
    whole = jax.nn.sigmoid(heads.sequence_scores(scorer, *rows[:2]))
    np.testing.assert_allclose(process.score(ONE_MARK)(scorer, *rows), whole, rtol=1e-6)


def test_marks_are_the_tokens_whose_text_ends_a_step():
    assert process.marks_of(BYTES) == MARKS
    with pytest.raises(ValueError, match=r"^no token of the tokenizer ends with '; '; let steps"):
        process.marks_of(BYTES, "; ")


def test_a_longer_token_that_ends_with_a_line_break_ends_a_step(real_data):
    gpt2 = from_folder(real_data / "tokenizers/gpt2")
    found = process.marks_of(gpt2)
    assert {198, 628} <= set(found.step_ends) and found.eos_ids == (50256,)
    assert all(gpt2.decode([i]).endswith("\n") for i in found.step_ends)


@pytest.mark.parametrize(
    "marks", [(10,), process.Marks([10]), process.Marks((True,)), process.Marks((10,), (-1,))]
)
def test_what_are_no_marks_is_refused(marks, no_shape_checks):
    for make in (process.score, ppo_variants.step_batch):
        with pytest.raises(ValueError, match=r"^marks=.* must be process.Marks of two tuples of"):
            make(marks)


def test_a_scorer_without_a_scalar_head_is_refused():
    rows = responses("a")
    for scorer in (None, tiny.model()):
        with pytest.raises(ValueError, match="a learned reward needs scorer=, a model with a scal"):
            process.score(MARKS)(scorer, *rows)
        with pytest.raises(ValueError, match="a learned reward needs scorer=, a model with a scal"):
            batch_of(ppo_variants.step_batch(MARKS), rollout_of("a"), {"scorer": scorer})


# --------------------------------------------------------------------------------------------- PPO


def rollout_of(*texts, seed=0):
    """A rollout of these responses, whose other numbers are drawn at random."""
    tokens, attend, mask = responses(*texts)
    rng = np.random.default_rng(seed)

    def noise():
        return jnp.asarray(rng.normal(size=mask.shape), jnp.float32) * mask

    return tiny.some_rollout(len(texts), tokens.shape[1])._replace(
        tokens=tokens,
        attend=attend,
        mask=mask,
        old_logprobs=noise(),
        ref_logprobs=noise(),
        values=noise(),
        finished=jnp.asarray([float(x.endswith("$")) for x in texts]),
    )


PLAIN = ppo.Config(whiten_advantages=False)


def batch_of(make_batch, rollout, params, config=PLAIN):
    return make_batch(config, params, ppo.algorithm().memory, rollout)


@pytest.fixture
def given(monkeypatch):
    """The scorer says 0.1 t at token t, whatever it reads."""

    def token_scores(scorer, tokens, attend):
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]) / 10.0, tokens.shape)

    monkeypatch.setattr(process, "token_scores", token_scores)


def test_every_step_is_paid_at_its_mark(given, scorer):
    """Two responses of four tokens, after a prompt of two, whose rewards are written down."""
    config = ppo.Config(whiten_advantages=False, kl_coef=0.5, discount=0.9, gae_lambda=0.8)
    rollout = rollout_of("a\nb$", "a\nb\n")
    make = ppo_variants.step_batch(MARKS, worth=jnp.sin)
    batch, _, metrics = batch_of(make, rollout, {"scorer": scorer}, config)
    kl = np.asarray(rollout.old_logprobs - rollout.ref_logprobs, np.float64)[:, 2:6]
    values = np.asarray(rollout.values, np.float64)[:, 2:6]
    steps = [[0, np.sin(0.3), 0, np.sin(0.5)]] * 2
    rewards = np.array(steps) - 0.5 * kl
    advantages = np.zeros((2, 4))
    for t in range(4):  # a sum of the errors to come, each discounted by 0.9 * 0.8 per token
        for k in range(t, 4):
            following = values[:, k + 1] if k < 3 else 0.0
            error = rewards[:, k] + 0.9 * following - values[:, k]
            advantages[:, t] += (0.9 * 0.8) ** (k - t) * error
    np.testing.assert_allclose(batch.advantages[:, 2:6], advantages, atol=1e-6)
    np.testing.assert_allclose(batch.returns[:, 2:6], advantages + values, atol=1e-6)
    total = np.sin(0.3) + np.sin(0.5)
    assert float(metrics["objective/scores"]) == pytest.approx(total, rel=1e-6)
    assert float(metrics["objective/steps"]) == 2


def paid(rollout, scorer, marks=MARKS, **settings):
    """The rewards per response token without KL, read off returns at lambda 1 and discount 1."""
    config = ppo.Config(whiten_advantages=False, kl_coef=0.0, gae_lambda=1.0, **settings)
    make = ppo_variants.step_batch(marks, worth=jnp.sin)
    batch, _, metrics = batch_of(make, rollout, {"scorer": scorer}, config)
    returns = np.asarray(batch.returns)[:, 2:]
    following = np.concatenate([returns[:, 1:], np.zeros((len(returns), 1))], axis=1)
    return returns - following, batch, metrics


def test_the_penalty_is_paid_at_the_end_and_steps_stay_where_they_are(given, scorer):
    rollout = rollout_of("a\nb\n$", "a\nbc")
    found, _, metrics = paid(rollout, scorer, missing_eos_penalty=2.0)
    sin = np.sin
    wanted = np.zeros((2, 10))
    wanted[0, [1, 3]] = sin(0.3), sin(0.5)  # nothing at the EOS after the second step
    wanted[1, [1, 3]] = sin(0.3), sin(0.5) - 2.0
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert float(metrics["objective/scores"]) == pytest.approx(sin(0.3) + sin(0.5) - 1, rel=1e-5)
    assert float(metrics["objective/raw_scores"]) == pytest.approx(sin(0.3) + sin(0.5), rel=1e-5)
    assert float(metrics["objective/scores_std"]) == pytest.approx(0, abs=1e-6)


def test_after_eos_is_for_the_step_that_the_last_token_ends(given, scorer):
    rollout = rollout_of("a\nb\n$", "a\nb$")
    found, batch, _ = paid(rollout, scorer, score_at="after_eos")
    wanted = np.zeros((2, 10))
    wanted[0, [1, 3]] = np.sin(0.3), np.sin(0.5)
    wanted[1, [1, 4]] = np.sin(0.3), np.sin(0.5)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert batch.value_mask.sum() == batch.mask.sum() + 2


def test_scores_that_are_to_be_normalised_are_refused(scorer):
    config = ppo.Config(normalise_scores=True)
    with pytest.raises(ValueError, match="normalise_scores=True would scale the scores of whole "):
        batch_of(ppo_variants.step_batch(MARKS), rollout_of("a"), {"scorer": scorer}, config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"missing_eos_penalty": 1.5, "whiten_rewards": True},
        {"score_at": "after_eos", "missing_eos_penalty": 0.5, "kl_target": 1.0},
    ],
)
def test_with_one_mark_the_batch_is_that_of_ppo_bit_for_bit(scorer, settings):
    rollout = rollout_of(*TEXTS)
    rows = (rollout.tokens, rollout.attend, rollout.mask)
    rollout = rollout._replace(scores=process.score(ONE_MARK)(scorer, *rows))
    config = ppo.Config(**settings)
    ours = batch_of(ppo_variants.step_batch(ONE_MARK), rollout, {"scorer": scorer}, config)
    theirs = batch_of(ppo.make_batch, rollout, {}, config)
    assert tiny.equal(ours[:2], theirs[:2])
    for name, value in theirs[2].items():
        assert float(ours[2][name]) == float(value), name


def test_with_log_probabilities_the_rewards_add_up_to_the_log_of_the_product(scorer):
    rollout = rollout_of(*TEXTS)
    rows = (rollout.tokens, rollout.attend, rollout.mask)
    make = ppo_variants.step_batch(MARKS, jax.nn.log_sigmoid)
    assert make is ppo_variants.step_batch(MARKS, jax.nn.log_sigmoid)
    _, _, metrics = batch_of(make, rollout, {"scorer": scorer})
    product = process.score(MARKS, process.product)(scorer, *rows)
    assert float(metrics["objective/raw_scores"]) == pytest.approx(
        float(jnp.log(product).mean()), rel=1e-5
    )


# -------------------------------------------------------------------------------------- whole runs

SMALL = Sampling(max_new_tokens=6)


@pytest.mark.parametrize("mesh", ["1x1x1", pytest.param("2x2x2", marks=pytest.mark.slow)])
def test_ppo_runs_on_the_rewards_of_steps(mesh):
    config = dataclasses.replace(tiny.PPO, num_iterations=2, batch_size=8, sampling=SMALL)
    scorer = learned_scorer().scorer
    vowels = process.Marks(tuple(b"aeiou"), (EOS,))
    result = tiny.run_ppo(
        config,
        mesh,
        scorer=scorer,
        score=process.score(vowels, process.product),
        make_batch=ppo_variants.step_batch(vowels),
        prompts=tiny.prompts(8),
    )
    for line in result.history:
        assert np.isfinite(line["loss"]) and line["objective/steps"] >= 1
        assert 0 < line["objective/scores"] <= line["objective/steps"]
    assert tiny.distance(result.policy, tiny.model()) > 0.01


def test_best_of_n_keeps_the_response_whose_steps_are_best():
    config = best_of_n.Config(
        num_iterations=2,
        batch_size=8,
        samples_per_prompt=4,
        sampling=SMALL,
        policy_optimizer=tiny.ADAM,
    )
    score = process.score(process.Marks(tuple(range(128)), (EOS,)), process.least)
    history = best_of_n.run(
        config,
        policy=tiny.model(),
        prompts=tiny.prompts(8),
        tokenizer=tiny.TOKENIZER,
        runtime=tiny.runtime(),
        scorer=learned_scorer().scorer,
        score=score,
    ).history
    for line in history:
        assert 0 < line["objective/scores"] < line["objective/best_scores"] < 1
        assert np.isfinite(line["loss"])
