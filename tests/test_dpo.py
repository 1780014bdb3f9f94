"""DPO and its relatives: each loss against a second derivation and TRL's numbers; whole runs."""

import dataclasses
import functools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import preference_losses as equations
from rlhf_jax.algorithms import dpo
from rlhf_jax.data import batches
from rlhf_jax.data.batches import Comparisons, Loader
from rlhf_jax.models import heads, lora, transformer
from rlhf_jax.models.partition import partition
from rlhf_jax.rewards import agreement
from rlhf_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compile_cache")

# ----------------------------------------------------------------- log-probabilities that are given

CONFIG = dpo.Config(beta=0.3, label_smoothing=0.1, simpo_gamma=0.4, batch_size=4)
RANKS = np.array([[0, 1, 2], [1, 0, 0], [0, 0, 1], [1, 1, 1]])
PRESENT = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
LENGTHS = np.array([[3, 2, 5], [4, 1, 0], [2, 2, 6], [1, 3, 2]])
SCORES = np.array([[1, 0.5, 0], [0, 1, 0], [1, 1, 0], [0.9, 0.9, 0.9]])
RANDOM = np.random.default_rng(0)
LOGPS = -LENGTHS * RANDOM.uniform(0.5, 2.0, LENGTHS.shape)
REF_LOGPS = np.where(PRESENT, LOGPS - RANDOM.normal(0.4, 1.0, LENGTHS.shape), 0.0)


def floats(x):
    return jnp.asarray(x, jnp.float32)


def comparisons(ranks=RANKS, present=PRESENT, lengths=LENGTHS, scores=SCORES):
    """Comparisons of responses of these lengths, each after one token of prompt."""
    steps = np.arange(1 + np.max(lengths))
    mask = (steps > 0) & (steps <= lengths[..., None])
    attend = (steps <= lengths[..., None]) & (present[..., None] > 0)
    return Comparisons(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        attend=jnp.asarray(attend, jnp.int32),
        mask=floats(mask),
        ranks=jnp.asarray(ranks, jnp.int32),
        present=floats(present),
        margin=jnp.zeros(len(ranks)),
        scores=None if scores is None else floats(scores),
    )


@pytest.fixture
def given(monkeypatch):
    """A model is the array of what it says: log p of each response, [B, K]."""
    monkeypatch.setattr(dpo, "response_logps", lambda model, batch, *_: model)


def both(logps=LOGPS, ref_logps=REF_LOGPS):
    return {"policy": floats(logps), "reference": floats(ref_logps)}


def alone(logps=LOGPS):
    return {"policy": floats(logps)}


LOSSES = {
    "loss": (dpo.loss, both),
    "hinge_loss": (dpo.hinge_loss, both),
    "ipo_loss": (dpo.ipo_loss, both),
    "kto_loss": (dpo.kto_loss, both),
    "simpo_loss": (dpo.simpo_loss, alone),
    "orpo_loss": (dpo.orpo_loss, alone),
}

# ---------------------------------------------------------- a second derivation, in loops and numpy


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def over_pairs(term):
    """Mean over prompts of the mean of `term(b, better, worse)` over the pairs of prompt b."""
    means = []
    for b in range(4):
        terms = [
            term(b, i, j)
            for i in range(3)
            for j in range(3)
            if PRESENT[b, i] and PRESENT[b, j] and RANKS[b, i] < RANKS[b, j]
        ]
        means += [sum(terms) / len(terms)] if terms else []
    return sum(means) / len(means)


def drift(logps):
    """Mean log-ratio of the responses that stand after another prompt, where both are there.

    The models here say the same of a response after any prompt.
    """
    found = [
        logps[b, k] - REF_LOGPS[b, k]
        for b in range(4)
        for k in range(3)
        if PRESENT[b, k] and PRESENT[b - 1, k]
    ]
    return max(0.0, sum(found) / len(found))


def by_hand(name, logps, kl):
    """The loss `name`; the KL of KTO is a constant."""
    beta, e = CONFIG.beta, CONFIG.label_smoothing
    ratio = logps - REF_LOGPS
    mean = logps / np.maximum(LENGTHS, 1)
    chance = np.exp(np.where(PRESENT, mean, -1.0))
    odds = chance / (1 - chance)
    if name == "loss":

        def term(b, i, j):
            right = sigmoid(beta * (ratio[b, i] - ratio[b, j]))
            return -(1 - e) * math.log(right) - e * math.log(1 - right)

    elif name == "hinge_loss":

        def term(b, i, j):
            return max(0.0, 1 - beta * (ratio[b, i] - ratio[b, j]))

    elif name == "ipo_loss":

        def term(b, i, j):
            one, other = ratio[b, i] / LENGTHS[b, i], ratio[b, j] / LENGTHS[b, j]
            return (one - other - 1 / (2 * beta)) ** 2

    elif name == "simpo_loss":

        def term(b, i, j):
            return -math.log(sigmoid(beta * mean[b, i] - beta * mean[b, j] - CONFIG.simpo_gamma))

    elif name == "orpo_loss":
        best = [(0, 0), (1, 1), (2, 0), (2, 1)]
        nll = -sum(logps[x] for x in best) / sum(LENGTHS[x] for x in best)
        # sigmoid(log(a / b)) = a / (a + b)
        return nll + beta * over_pairs(
            lambda b, i, j: -math.log(odds[b, i] / (odds[b, i] + odds[b, j]))
        )
    else:
        # The last prompt has no pair: what it says is rated above 1/2, and so desirable.
        good = [(0, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
        bad = [(0, 1), (0, 2), (1, 0), (2, 2)]
        terms = [1 - sigmoid(beta * (ratio[x] - kl)) for x in good]
        terms += [1 - sigmoid(beta * (kl - ratio[x])) for x in bad]
        return sum(terms) / len(terms)
    return over_pairs(term)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_a_second_derivation(given, name):
    """The gradient by central differences of the second derivation, which is in float64."""
    fn, params = LOSSES[name]
    params = params()

    def of_policy(logps):
        return fn(CONFIG, {**params, "policy": logps}, comparisons())[0]

    value, gradient = jax.value_and_grad(of_policy)(params["policy"])
    expected = functools.partial(by_hand, name, kl=drift(LOGPS))
    assert drift(LOGPS) > 0.1
    assert float(value) == pytest.approx(expected(LOGPS), rel=1e-5)
    for place in np.ndindex(LOGPS.shape):
        step = np.zeros_like(LOGPS)
        step[place] = 1e-5
        slope = (expected(LOGPS + step) - expected(LOGPS - step)) / 2e-5
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-4, abs=1e-6), place
    assert not gradient[1, 2] and np.abs(gradient).max() > 5e-3


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_noted_of_absent_responses_never_changes_a_loss(given, name):
    fn, params = LOSSES[name]
    clean, _ = fn(CONFIG, params(), comparisons())
    ranks, scores = (np.where(PRESENT, x, 7) for x in (RANKS, SCORES))
    other, _ = fn(CONFIG, params(), comparisons(ranks=ranks, scores=scores))
    assert float(clean) == float(other)


def test_a_kl_estimate_below_0_counts_as_0(given):
    value, metrics = dpo.kto_loss(CONFIG, both(LOGPS - 5.0), comparisons())
    assert float(metrics["kl"]) == 0.0
    assert float(value) == pytest.approx(by_hand("kto_loss", LOGPS - 5.0, 0.0), rel=1e-5)


def test_without_ratings_kto_leaves_out_prompts_whose_responses_are_tied(given):
    rated, _ = dpo.kto_loss(CONFIG, both(), comparisons())
    unrated, _ = dpo.kto_loss(CONFIG, both(), comparisons(scores=None))
    ratio = LOGPS - REF_LOGPS
    tied = [1 - sigmoid(CONFIG.beta * (x - drift(LOGPS))) for x in ratio[3]]
    assert float(unrated) == pytest.approx((11 * float(rated) - sum(tied)) / 8, rel=1e-5)


def test_conservative_dpo_is_least_where_the_chance_is_one_minus_the_smoothing():
    gap = jnp.linspace(-4.0, 6.0, 1001)
    best = gap[jnp.argmin(equations.sigmoid_loss(gap, 0.1))]
    assert float(best) == pytest.approx(math.log(0.9 / 0.1), abs=0.01)


def test_the_odds_of_a_certain_response_are_finite_and_those_of_an_unlikely_one_exact():
    certain, unlikely = equations.log_odds(jnp.array([0.0, -50.0])).tolist()
    assert 13 < certain < 14  # log 10^6
    assert unlikely == pytest.approx(-50.0)


# -------------------------------------------------------------------------- worked numbers of pairs

PAIRS = {
    "policy": [[-12.0, -15.0], [-20.0, -18.0]],
    "reference": [[-13.0, -14.0], [-19.0, -19.5]],
}
PAIR_LENGTHS = np.array([[6, 5], [10, 9]])


def pairs():
    ones = np.ones((2, 2))
    return comparisons(np.array([[0, 1], [0, 1]]), ones, PAIR_LENGTHS, np.array([[1, 0], [1, 0]]))


def pair_models(*names):
    return {name: floats(PAIRS[name]) for name in names}


PRINTED = {
    "loss": (dpo.loss, ("policy", "reference"), 0.712039),
    "hinge_loss": (dpo.hinge_loss, ("policy", "reference"), 1.025),
    "ipo_loss": (dpo.ipo_loss, ("policy", "reference"), 24.602778),
}


@pytest.mark.parametrize("name", PRINTED)
def test_pairs_have_the_losses_of_trls_formulas(given, name):
    fn, models, printed = PRINTED[name]
    value, _ = fn(dpo.Config(), pair_models(*models), pairs())
    assert float(value) == pytest.approx(printed, abs=1e-6 * max(1, printed))


def test_the_equation_of_ipo_on_whole_responses_is_that_of_openrlhf():
    gap = floats([2.0, -2.5])
    assert float(jnp.mean(equations.ipo_loss(gap, 0.1))) == pytest.approx(32.625)


# ------------------------------------------------------------------------------- what a model says

ROWS = [
    {"prompt": "ab", "chosen": "cdef", "rejected": "g"},
    {"prompt": "h", "chosen": "i", "rejected": "jk"},
    {"prompt": "lmn", "chosen": "o", "rejected": "pqr"},
    {"prompt": "s", "chosen": "tu", "rejected": "v"},
]


@pytest.fixture(scope="module")
def batch():
    """Four prompts with two responses each, every one of another length."""
    (found,) = Loader(batches.comparisons(ROWS, tiny.TOKENIZER, 4, 5), 4).epoch_batches()
    return jax.tree.map(jnp.asarray, found)


@pytest.fixture(scope="module")
def texts(batch):
    """(prompt, response) of each row, [4][2], as lists of ids."""
    examples = batches.comparisons(ROWS, tiny.TOKENIZER, 4, 5)
    return [
        [(ids[~said].tolist(), ids[said].tolist()) for ids, said in row.documents]
        for row in examples.rows
    ]


@pytest.fixture(scope="module")
def models():
    return {"policy": tiny.model(seed=1), "reference": tiny.model()}


def spoken(model, pairs):
    """log p(response | prompt) of (prompt, response)s, from the logits in float64."""
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens = np.zeros((len(pairs), width), np.int32)
    attend = np.zeros_like(tokens)
    for row, (prompt, response) in enumerate(pairs):
        ids = prompt + response
        tokens[row, : len(ids)], attend[row, : len(ids)] = ids, 1
    hidden = transformer.hidden_states(model, jnp.asarray(tokens), jnp.asarray(attend))
    logits = np.asarray(transformer.logits(model, hidden), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array(
        [
            sum(
                logprobs[row, len(prompt) + t - 1, token]  # said at the token before
                for t, token in enumerate(response)
            )
            for row, (prompt, response) in enumerate(pairs)
        ]
    )


def test_a_response_is_scored_with_its_eos_and_without_its_prompt(models, batch, texts):
    flat = [pair for row in texts for pair in row]
    assert all(response[-1] in tiny.TOKENIZER.eos_ids for _, response in flat)
    expected = spoken(models["policy"], flat).reshape(4, 2)
    found = dpo.measure(dpo.Config(), models, batch)
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5)
    lengths = [[len(response) for _, response in row] for row in texts]
    assert found.lengths.tolist() == lengths
    expected = spoken(models["reference"], flat).reshape(4, 2)
    np.testing.assert_allclose(found.ref_logps, expected, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_kto_measures_the_kl_on_the_responses_to_the_prompt_before(models, batch, texts, turned):
    if turned:  # then the estimate has the other sign
        models = {"policy": models["reference"], "reference": models["policy"]}
    wrong = [(texts[i][k][0], texts[i - 1][k][1]) for i in range(4) for k in range(2)]
    right = [pair for row in texts for pair in row]
    moved, ratio = (
        spoken(models["policy"], rows) - spoken(models["reference"], rows)
        for rows in (wrong, right)
    )
    config = dpo.Config(beta=0.2, batch_size=4)
    value, metrics = dpo.kto_loss(config, models, batch)
    kl = max(0.0, moved.mean())
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-3, abs=1e-6)
    chosen, rejected = 0.2 * ratio[::2], 0.2 * ratio[1::2]
    terms = [1 - sigmoid(x - 0.2 * kl) for x in chosen]
    terms += [1 - sigmoid(0.2 * kl - x) for x in rejected]
    assert float(value) == pytest.approx(np.mean(terms), rel=1e-4)
    assert float(metrics["rewards/chosen"]) == pytest.approx(chosen.mean(), rel=1e-4)
    assert float(metrics["rewards/margins"]) == pytest.approx(
        chosen.mean() - rejected.mean(), rel=1e-4
    )


def with_garbage(batch):
    tokens = np.random.default_rng(1).integers(0, 256, batch.tokens.shape)
    return batch._replace(tokens=jnp.where(batch.attend > 0, batch.tokens, tokens))


def wider(batch):
    def wide(x):
        return jnp.pad(x, ((0, 0), (0, 0), (3, 2))) if x.ndim == 3 else x

    return with_garbage(Comparisons(*map(wide, batch)))


def said(micro_batches, params, batch):
    """(loss, gradient) of KTO, which reads everything that the other losses read, and more."""
    config = dpo.Config(batch_size=4, micro_batches=micro_batches)

    def of_policy(policy):
        return dpo.kto_loss(config, {**params, "policy": policy}, batch)[0]

    return jax.jit(jax.value_and_grad(of_policy))(params["policy"])


def test_padding_and_micro_batches_change_neither_a_loss_nor_its_gradient(models, batch):
    value, gradient = said(1, models, batch)
    norm = tiny.distance(gradient, jax.tree.map(jnp.zeros_like, gradient))
    others = (said(1, models, with_garbage(batch)), said(1, models, wider(batch)))
    for other, its_gradient in (*others, said(2, models, batch)):
        assert float(other) == pytest.approx(float(value), rel=1e-6)
        assert tiny.distance(its_gradient, gradient) < 1e-5 * norm


@pytest.mark.usefixtures("no_shape_checks")
def test_no_gradient_reaches_the_probability_of_a_prompt_or_of_padding(monkeypatch, batch):
    """A model is the array of what it says of each token here."""
    rows = (8, batch.tokens.shape[2])
    monkeypatch.setattr(transformer, "hidden_states", lambda *_: None)
    monkeypatch.setattr(heads, "token_logprobs", lambda model, *_: (model, None))
    monkeypatch.setattr(heads, "must_recompute", lambda *_: True)
    policy, reference = floats(np.random.default_rng(2).normal(-2, 1, (2, *rows)))

    def of_tokens(policy):
        return dpo.loss(dpo.Config(), {"policy": policy, "reference": reference}, batch)[0]

    gradient = jax.grad(of_tokens)(policy)
    np.testing.assert_array_equal(gradient != 0, batch.mask.reshape(rows) > 0)


# ----------------------------------------------------------------------------------------- runs

RUN = dpo.Config(num_steps=4, batch_size=8, optimizer=tiny.ADAM, save_every=1)


def run(config=RUN, mesh="1x1x1", checkpoints=None, policy=None, data=None, **options):
    return dpo.run(
        config,
        policy or tiny.model(mesh),
        data or tiny.comparisons(config.batch_size),
        runtime=tiny.runtime(mesh, checkpoints),
        **options,
    )


@pytest.fixture(scope="module")
def trained():
    return run()


def test_training_starts_at_log_2_and_learns_the_comparisons(trained):
    first, *_, last = trained.history
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    # Not 0, because the policy's program also computes a gradient and rounds in another order.
    for name in ("chosen", "rejected", "margins"):
        assert abs(first[f"rewards/{name}"]) < 1e-6
    assert first["num_pairs"] == first["num_prompts"] == 8
    assert first["logps/chosen"] < -10 and first["grad_norm"] > 0.01
    assert last["loss"] < 0.6 and last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("loss_fn", "mesh"),
    [(dpo.loss, "1x8x1"), (dpo.loss, "2x2x2"), (dpo.kto_loss, "2x2x2")],
    ids=["dpo-1x8x1", "dpo-2x2x2", "kto-2x2x2"],
)
def test_a_run_is_the_same_on_eight_devices(trained, loss_fn, mesh):
    alone = trained if loss_fn is dpo.loss else run(loss_fn=loss_fn)
    split = run(mesh=mesh, loss_fn=loss_fn)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        values = [line[name] for line in alone.history]
        np.testing.assert_allclose(
            [line[name] for line in split.history], values, rtol=1e-4, atol=1e-5
        )
    moved = tiny.distance(alone.policy, tiny.model())
    assert moved > 0.1 and tiny.distance(split.policy, alone.policy) < 1e-3 * moved


@pytest.mark.parametrize("name", ["hinge_loss", "ipo_loss", "simpo_loss", "orpo_loss"])
def test_every_loss_trains(name):
    free = name in ("simpo_loss", "orpo_loss")
    config = dataclasses.replace(RUN, num_steps=3)
    history = run(config, loss_fn=getattr(dpo, name), reference_free=free).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]


def test_an_interrupted_run_ends_with_the_same_bits(trained, tmp_path):
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        run(checkpoints=checkpoints)
    for later in (3, 4):
        shutil.rmtree(tmp_path / str(later))
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        again = run(checkpoints=checkpoints)
    assert [line["step"] for line in again.history] == [2, 3]
    assert tiny.equal(again.policy, trained.policy)
    for line, expected in zip(again.history, trained.history[2:]):
        assert tiny.untimed(line) == tiny.untimed(expected)


def test_held_out_pairs_are_judged_by_the_reward_with_an_interval():
    config = dataclasses.replace(RUN, eval_every=4)
    held_out = tiny.comparisons(8, seed=1)
    result = run(config, held_out=held_out)
    policy, reference = result.policy, tiny.model()
    (rows,) = tiny.comparisons(12).epoch_batches()
    rows = jax.tree.map(jnp.asarray, rows)
    logps, ref_logps = (np.asarray(dpo.response_logps(x, rows)) for x in (policy, reference))
    ranks, lengths = np.asarray(rows.ranks), np.asarray(rows.mask).sum(2).astype(int)
    figures = {name[5:]: x for name, x in result.history[-1].items() if name.startswith("eval/")}
    rewards = 0.1 * (logps - ref_logps)
    gap = rewards[:, 0] - rewards[:, 1]
    assert figures["loss"] == pytest.approx(np.log1p(np.exp(-gap)).mean(), rel=1e-4)
    expected = agreement.agreement(rewards, ranks, np.ones((12, 2)), lengths)
    names = ("accuracy", "accuracy_low", "accuracy_high", "longer_wins", "pairs")
    assert {x: figures[x] for x in names} == {x: expected[x] for x in names}
    # Without a reference the reward is the mean log-probability.
    plain = dpo.evaluate(config, policy, held_out, reference=None, mesh=tiny.mesh())
    means = logps / lengths
    assert plain["accuracy"] == np.mean(means[:, 0] > means[:, 1])


# --------------------------------------------------------------------------------- the reference


def seen_by(loss_fn, **options):
    """The models that a loss is given in a run."""
    seen = []

    def recording(config, params, batch):
        seen.append(params)
        return loss_fn(config, params, batch)

    result = run(dataclasses.replace(RUN, num_steps=1), loss_fn=recording, **options)
    return seen[0].keys(), result


def test_a_reference_free_run_holds_no_reference():
    assert seen_by(dpo.simpo_loss, reference_free=True)[0] == {"policy"}
    assert seen_by(dpo.loss)[0] == {"policy", "reference"}


def test_another_model_may_be_the_reference():
    first = run(dataclasses.replace(RUN, num_steps=1), reference=tiny.model(seed=3)).history[0]
    assert abs(first["rewards/margins"]) > 1e-3 and first["loss"] != pytest.approx(math.log(2))


def adapted(scale=0.0):
    policy = lora.attach(tiny.model(), lora.Config(rank=2), jax.random.key(1))
    return jax.tree.map_with_path(
        lambda path, x: x + scale if path[-1].key == "lora_b" else x, policy
    )


def buffers(tree):
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    shards = [s.data for x in arrays for s in x.addressable_shards]
    return {x.unsafe_buffer_pointer(): x.nbytes for x in shards}


def test_with_an_adapter_the_reference_is_the_base_and_only_the_adapter_moves(monkeypatch):
    policy = adapted()
    base = partition({"policy": policy})[1]["policy"]
    held, evaluate = [], dpo.evaluate

    def recording(*args, reference, mesh):
        assert buffers(reference) == buffers(policy)
        held.append(sum(buffers(jax.live_arrays()).values()))
        return evaluate(*args, reference=reference, mesh=mesh)

    monkeypatch.setattr(dpo, "evaluate", recording)
    before = sum(buffers(jax.live_arrays()).values())
    config = dataclasses.replace(RUN, eval_every=2)
    result = run(config, policy=policy, held_out=tiny.comparisons(8))
    assert result.history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert result.history[-1]["loss"] < 0.68
    assert buffers(partition({"policy": result.policy})[1]) == buffers(base)
    assert tiny.distance(result.policy, policy) > 0.01
    # Adapter, its moments and a batch: no second copy of the base.
    assert max(held) - before < 0.5 * sum(buffers(base).values())
    monkeypatch.setattr(dpo, "evaluate", evaluate)
    other = run(config, policy=adapted(), reference=tiny.model(), held_out=tiny.comparisons(8))
    assert [x["loss"] for x in other.history] == pytest.approx(
        [x["loss"] for x in result.history], rel=1e-6
    )


def test_an_adapter_that_was_trained_before_is_part_of_the_reference():
    (first,) = run(dataclasses.replace(RUN, num_steps=1), policy=adapted(0.02)).history
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)


# -------------------------------------------------------------------------------- misuse, in words


def single_answers(batch_size=8):
    rows = [{"prompt": w, "completion": w, "label": i % 2 == 0} for i, w in enumerate(tiny.WORDS)]
    return Loader(batches.scored(rows, tiny.TOKENIZER, 4, 5), batch_size)


def only_a_number(config, params, batch):
    return dpo.loss(config, params, batch)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": tiny.demonstrations()}, r"dpo\.run takes comparisons, but .* Demonstrations"),
        ({"data": tiny.prompts(8)}, r"dpo\.run takes comparisons, but the loader draws Prompts"),
        ({"held_out": tiny.prompts(8)}, r"dpo\.run takes comparisons, but the loader draws Prom"),
        ({"data": single_answers()}, r"one response to each \(K=1\); give it batches.comparisons"),
        ({"loss_fn": only_a_number}, r"only_a_number returned an array of shape \[\]; return the"),
        ({"loss_fn": dpo.simpo_loss}, "compares with no reference, .* by reference_free=True"),
        ({"loss_fn": dpo.orpo_loss}, "compares with no reference, .* by reference_free=True"),
        ({"reference_free": True}, "compares the policy with a reference, and reference_free=True"),
        (
            {"reference_free": True, "loss_fn": dpo.kto_loss},
            "compares the policy with a reference, and reference_free=True leaves it out",
        ),
        (
            {"reference_free": True, "reference": True},
            "reference= does nothing with reference_free=True; leave one of them out",
        ),
        ({"held_out": tiny.comparisons()}, "eval_every=0 never runs it; set it above 0"),
        ({"data": tiny.comparisons(4)}, "the loader draws batches of 4, but .* batch_size=8"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(options, message):
    if "reference" in options:
        options = {**options, "reference": tiny.model()}
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    config = dataclasses.replace(RUN, batch_size=12)
    with pytest.raises(ValueError, match="batch_size=12 does not divide over data x fsdp = 8"):
        run(config, mesh="8x1x1")


def test_kto_needs_a_second_prompt_in_a_batch(models, batch):
    one = jax.tree.map(lambda x: x[:1], batch)
    with pytest.raises(ValueError, match="batch_size=1 has no other; make it 2 or more"):
        dpo.kto_loss(dpo.Config(batch_size=1), models, one)


def test_kto_learns_from_single_answers_with_labels():
    history = run(data=single_answers(), loss_fn=dpo.kto_loss).history
    assert history[0]["loss"] == pytest.approx(0.5, rel=1e-6) and history[0]["num_pairs"] == 0
    assert history[-1]["loss"] < 0.49 and history[-1]["rewards/margins"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, "beta=0.0 must be above 0"),
        ({"label_smoothing": 0.6}, r"label_smoothing=0.6 must be in \[0, 0.5\]"),
        ({"simpo_gamma": -1.0}, "simpo_gamma=-1.0 must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dpo.Config(**fields)
