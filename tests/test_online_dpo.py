"""Online DPO: which responses make a pair, the loss of the pair, and whole runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import abstract, losses, online, preference_losses
from rlhf_jax.algorithms import dpo, online_dpo
from rlhf_jax.data.batches import Comparisons
from rlhf_jax.models import heads
from rlhf_jax.sampling import Rollout, Sampling
from rlhf_jax.sampling.rollout import Outputs
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.state import TrainingStopped

pytestmark = pytest.mark.usefixtures("compile_cache")

PICK = online_dpo.Config(batch_size=3, samples_per_prompt=4, missing_eos_penalty=2.0)
WIDTH = 5


def some_rollout(scores, finished=None):
    """Rows whose tokens, log-probabilities and number of tokens are told by their number."""
    count = len(scores)
    number = np.arange(count)
    lengths = 1 + number % WIDTH
    mask = np.arange(WIDTH) < lengths[:, None]
    nats = jnp.asarray(-0.1 * number[:, None] * mask, jnp.float32)
    return Rollout(
        tokens=jnp.asarray(number[:, None] * np.ones((1, WIDTH)), jnp.int32),
        attend=jnp.asarray(mask, jnp.int32),
        mask=jnp.asarray(mask, jnp.float32),
        old_logprobs=nats,
        sampler_logprobs=nats,
        filtered_logprobs=nats,
        forward_logprobs=nats,
        ref_logprobs=2 * nats,
        entropy=nats,
        values=None,
        scores=jnp.asarray(scores, jnp.float32),
        lengths=jnp.asarray(lengths, jnp.int32),
        finished=jnp.ones(count) if finished is None else jnp.asarray(finished, jnp.float32),
        index=jnp.asarray(number // 4, jnp.int32),
    )


def test_the_best_and_the_worst_response_to_a_prompt_make_its_pair():
    scores = [1, 4, 2, 3, 7, 7, 7, 7, 0, -1, 5, 5]
    rollout = some_rollout(scores)
    batch, memory, metrics = online_dpo.make_batch(PICK, {}, (), rollout)
    rows = [[1, 0], [4, 4], [10, 9]]  # of responses with one score the first
    assert batch.tokens[..., 0].tolist() == rows
    for name in ("attend", "mask", "old_logprobs"):
        expected = np.asarray(getattr(rollout, name))[np.array(rows)]
        np.testing.assert_array_equal(getattr(batch, name), expected)
    expected = [[-0.2 * i * (1 + i % WIDTH) for i in pair] for pair in rows]
    np.testing.assert_allclose(batch.ref_logps, expected, rtol=1e-6)
    assert batch.decided.tolist() == [1, 0, 1] and memory == ()
    assert float(metrics["objective/scores_margin"]) == pytest.approx((3 + 0 + 6) / 3)
    assert float(metrics["objective/ties"]) == pytest.approx(1 / 3)


def test_a_response_without_eos_is_scored_lower():
    scores = [1, 4, 2, 3, 7, 7, 7, 7, 0, -1, 5, 5]
    finished = [1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    batch, _, metrics = online_dpo.make_batch(PICK, {}, (), some_rollout(scores, finished))
    assert batch.tokens[..., 0].tolist() == [[3, 0], [4, 7], [10, 9]]
    assert batch.decided.tolist() == [1, 1, 1]
    assert float(metrics["objective/raw_scores"]) == pytest.approx(np.mean(scores))
    assert float(metrics["objective/scores"]) == pytest.approx(np.mean(scores) - 2 * 2 / 12)


def pairs(logps, ref_logps, decided):
    """A batch of pairs of two tokens, the second one sampled, and what the policy says of them."""
    ones = jnp.ones((len(decided), 2, 2))
    said = jnp.stack([0 * ones[..., 0] - 9.0, jnp.asarray(logps, jnp.float32)], axis=2)
    batch = online_dpo.Batch(
        tokens=jnp.zeros(said.shape, jnp.int32),
        attend=jnp.ones(said.shape, jnp.int32),
        mask=ones.at[..., 0].set(0.0),
        old_logprobs=said - 0.1,
        ref_logps=jnp.asarray(ref_logps, jnp.float32),
        decided=jnp.asarray(decided, jnp.float32),
    )
    return batch, said


LOGPS = np.array([[-12.0, -15.0], [-20.0, -18.0], [-3.0, -8.0]])
REF_LOGPS = np.array([[-13.0, -14.0], [-19.0, -19.5], [-3.5, -1.0]])


@pytest.fixture
def said(monkeypatch):
    """The policy is the array of what it says of each token, [B, 2, T]."""

    def forward(config, params, batch):
        rows = params["policy"].reshape(batch.tokens.shape)
        return Outputs(rows, None, 0.5 * jnp.ones_like(rows))

    monkeypatch.setattr(online, "forward", forward)


def test_the_loss_is_that_of_offline_dpo_on_the_pairs_that_are_decided(said, monkeypatch):
    batch, policy = pairs(LOGPS, REF_LOGPS, [1, 1, 0])
    config = online_dpo.Config(batch_size=3)
    value, metrics = online_dpo.loss(config, {"policy": policy}, batch)
    assert float(value) == pytest.approx(0.712039, abs=1e-6)  # as printed in test_dpo
    monkeypatch.setattr(dpo, "response_logps", lambda model, batch, *_: model)
    ranks = jnp.array([[0, 1], [0, 1], [3, 3]])
    offline = Comparisons(
        batch.tokens, batch.attend, batch.mask, ranks, jnp.ones((3, 2)), jnp.zeros(3)
    )
    models = {"policy": jnp.asarray(LOGPS, jnp.float32), "reference": batch.ref_logps}
    expected, figures = dpo.loss(dpo.Config(), models, offline)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for name, figure in figures.items():
        assert float(metrics[name]) == pytest.approx(float(figure), rel=1e-6), name
    assert float(metrics["policy/approxkl_avg"]) == pytest.approx(0.5 * 0.1**2, rel=1e-4)


def test_the_gradient_is_beta_times_the_chance_of_the_other_order(said):
    batch, policy = pairs(LOGPS, REF_LOGPS, [1, 1, 0])
    config = online_dpo.Config(batch_size=3, beta=0.2)

    def of_policy(policy):
        return online_dpo.loss(config, {"policy": policy}, batch)[0]

    gradient = jax.grad(of_policy)(policy)
    gap = 0.2 * ((LOGPS - REF_LOGPS) @ [1.0, -1.0])
    slope = np.where([True, True, False], 0.2 / (1 + np.exp(gap)) / 2, 0.0)
    np.testing.assert_allclose(gradient[..., 1], np.stack([-slope, slope], axis=1), rtol=1e-5)
    assert not gradient[..., 0].any()


def test_a_score_that_is_no_number_makes_the_loss_none(said):
    nan = online_dpo.make_batch(PICK, {}, (), some_rollout([1, 2, np.nan, 4, *range(8)]))[0]
    _, policy = pairs(LOGPS, REF_LOGPS, [1, 1, 1])
    batch, _ = pairs(LOGPS, REF_LOGPS, nan.decided)
    assert np.isnan(online_dpo.loss(PICK, {"policy": policy}, batch)[0])


# ----------------------------------------------------------------------------------------- runs

RUN = online_dpo.Config(
    num_iterations=4,
    batch_size=16,
    samples_per_prompt=4,
    num_epochs=2,
    num_minibatches=2,
    sampling=Sampling(max_new_tokens=6),
    policy_optimizer=tiny.ADAM,
    save_every=1,
)


def run(config=RUN, mesh="1x1x1", checkpoints=None, **changes):
    inputs = {"score": tiny.share_below_128} | changes
    return online_dpo.run(
        config,
        policy=tiny.model(mesh),
        prompts=tiny.prompts(config.batch_size),
        tokenizer=tiny.TOKENIZER,
        runtime=tiny.runtime(mesh, checkpoints),
        **inputs,
    )


@pytest.fixture(scope="module")
def trained():
    return run()


def test_the_reward_rises_and_the_policy_starts_as_its_reference(trained):
    first, *_, last = trained.history
    assert abs(first["objective/kl"]) < 1e-4 and first["check/first_approxkl"] < 1e-8
    # The mean over four updates, the first of which starts at log 2.
    assert first["loss"] < math.log(2) and first["objective/scores_margin"] > 0.2
    # Scores of 64 responses are noisy, but what an update prefers it has made more likely.
    assert all(line["rewards/accuracies"] > 0.6 for line in trained.history)
    assert last["objective/kl"] > 0.02
    assert {"rewards/chosen", "logps/rejected", "policy/entropy_avg"} <= first.keys()


def test_a_run_is_the_same_on_eight_devices(trained):
    split = run(mesh="2x2x2")
    for name in ("loss", "grad_norm", "objective/kl", "objective/scores_margin"):
        values = [line[name] for line in trained.history]
        found = [line[name] for line in split.history]
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-6)
    moved = tiny.distance(trained.policy, tiny.model())
    assert moved > 0.1 and tiny.distance(split.policy, trained.policy) < 1e-3 * moved


def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        run(dataclasses.replace(RUN, num_iterations=2), checkpoints=checkpoints)
        again = run(checkpoints=checkpoints)
    assert len(again.history) == 2 and tiny.equal(again.policy, trained.policy)


def all_alike(params, tokens, attend, mask):
    return jnp.ones(len(tokens))


def test_nothing_is_learned_from_responses_that_are_all_alike():
    config = dataclasses.replace(RUN, num_iterations=1)
    result = run(config, score=all_alike)
    assert result.history[0]["objective/ties"] == 1.0 and result.history[0]["grad_norm"] == 0.0
    assert tiny.equal(result.policy, tiny.model())


def not_a_number(params, tokens, attend, mask):
    return jnp.where(jnp.arange(len(tokens)) == 5, jnp.nan, jnp.arange(len(tokens)))


def test_a_reward_that_is_no_number_stops_the_run():
    with pytest.raises(TrainingStopped, match="1 scores of the reward are NaN"):
        run(dataclasses.replace(RUN, num_iterations=1), score=not_a_number)


def ipo_loss(config, params, batch):
    """A loss of one's own: IPO on the log-ratios of whole responses, as TRL's online trainer."""
    ratios, metrics = online_dpo.log_ratios(config, params, batch)
    terms = preference_losses.ipo_loss(ratios[:, 0] - ratios[:, 1], config.beta)
    return losses.masked_mean(terms, batch.decided), metrics


def test_another_loss_reads_the_same_pairs():
    once = dataclasses.replace(RUN, num_iterations=1, num_epochs=1, num_minibatches=1)
    (line,) = run(once, loss_fn=ipo_loss).history
    assert line["loss"] == pytest.approx(25, rel=1e-4)  # (1 / (2 * 0.1))^2


def test_what_a_plan_compiles_is_what_runs(called_programs):
    scorer = heads.init_scorer(tiny.model(), jax.random.key(7))
    run(dataclasses.replace(RUN, num_iterations=1), score=None, scorer=scorer)
    ran, mesh = set(called_programs.called), tiny.mesh()
    policy = abstract.model(tiny.SHAPE, mesh)
    scorer = abstract.derived(heads.init_scorer, mesh, policy, jax.random.key(7))
    config = dataclasses.replace(RUN, num_iterations=1)
    stage = online_dpo.programs(
        config,
        policy=policy,
        scorer=scorer,
        max_prompt=4,
        ends=tiny.TOKENIZER.ends,
        mesh=mesh,
    )
    assert called_programs.of(stage.programs) == ran and len(ran) == 3


# -------------------------------------------------------------------------------- misuse, in words


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt=1 leaves nothing to compare; online DPO"),
        (
            {"batch_size": 8, "samples_per_prompt": 3, "num_minibatches": 3},
            "batch_size=8 pairs per iteration, .* are not a multiple of num_minibatches=3",
        ),
        (
            {"batch_size": 3, "num_minibatches": 1, "micro_batches": 4},
            "a minibatch of 6 responses, two of each prompt, is not a multiple of micro_batches=4",
        ),
        ({"sampling": Sampling(temperature=0.0)}, "sampling.temperature=0 is greedy"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RUN, **fields)


def test_a_critic_is_refused():
    with pytest.raises(ValueError, match="this algorithm has no critic; leave critic= out"):
        run(critic=tiny.model())


def test_pairs_have_to_divide_over_the_mesh():
    config = dataclasses.replace(RUN, batch_size=8, num_minibatches=2)
    message = "batch_size / num_minibatches=4 does not divide over data x fsdp = 8"
    with pytest.raises(ValueError, match=message):
        run(config, mesh="8x1x1")
