"""The one loop: its order of events, resuming, evaluation, frozen models, kept programs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import losses
from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.config import Positive
from rlhf_jax.data import epoch
from rlhf_jax.models import heads, transformer
from rlhf_jax.training import loop
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Outcome, Plan
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import TrainingStopped

pytestmark = pytest.mark.usefixtures("compile_cache")

DISPLAY = Display("A task", ("loss",), {"loss": "Loss"})

# -------------------------------------------------------------------- the order of events, by stubs


class Numbers:
    """Batch i is the number i."""

    def from_position(self, i):
        return itertools.count(i)


class Recorded(Checkpoints):
    """Checkpoints that say when they are written, and of how many numbers."""

    def __init__(self, folder, events):
        super().__init__(folder, keep=10)
        self.events, self.sizes = events, []

    def save(self, step, tree, metrics):
        self.events.append(f"save {step}")
        self.sizes.append(sum(leaf.size for leaf in jax.tree.leaves(tree)))
        super().save(step, tree, metrics)


def counted(events, plan, checkpoints=None, check=lambda step, metrics: None):
    """A run whose state is the number of its steps; every call goes into `events`."""

    def step(state, batch):
        events.append(f"step {batch}")
        metrics = {"loss": jnp.float32(10 * batch)}
        return {"count": state["count"] + 1}, Outcome(metrics, jnp.int32(5), record=batch)

    def observe(record):
        events.append(f"read {record}")
        return {"observed": float(record)}

    def evaluate(done, state):
        events.append(f"evaluate {done}")
        return {"count": float(state["count"])}

    runtime = tiny.runtime(checkpoints=checkpoints)
    start = {"count": jnp.int32(0)}
    state, history = loop.train(
        step, start, Numbers(), plan, runtime, check=check, observe=observe, evaluate=evaluate
    )
    return int(state["count"]), history


def test_metrics_are_read_one_step_late_and_before_a_checkpoint_is_written(tmp_path):
    events = []
    with Recorded(tmp_path, events) as checkpoints:
        count, history = counted(events, Plan("task", DISPLAY, 5, 3, 2), checkpoints)
    assert count == 5
    assert events == [
        *("step 0", "step 1", "evaluate 2", "read 0"),
        *("step 2", "read 1", "read 2", "save 3"),
        *("step 3", "evaluate 4"),
        *("step 4", "evaluate 5", "read 3", "read 4", "save 5"),
    ]
    assert [line["loss"] for line in history] == [0, 10, 20, 30, 40]
    assert [line["observed"] for line in history] == [0, 1, 2, 3, 4]
    assert [line.get("eval/count") for line in history] == [None, 2, None, 4, 5]


def test_a_longer_run_continues_where_the_last_one_ended(tmp_path):
    events = []
    with Checkpoints(tmp_path) as checkpoints:
        counted([], Plan("task", DISPLAY, 3, 100), checkpoints)
        count, history = counted(events, Plan("task", DISPLAY, 5, 100), checkpoints)
        assert count == 5 and [line["step"] for line in history] == [3, 4]
        assert events == ["step 3", "step 4", "read 3", "read 4"]
        # What is finished is restored, and nothing is done again.
        del events[:]
        assert counted(events, Plan("task", DISPLAY, 5, 100, 1), checkpoints) == (5, [])
        assert events == []


def test_a_step_that_fails_its_check_is_never_saved(tmp_path):
    def check(step, metrics):
        if metrics["loss"] >= 30:
            raise TrainingStopped(f"step {step}")

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TrainingStopped, match="step 3"):
            counted([], Plan("task", DISPLAY, 6, 2), checkpoints, check)
        assert checkpoints.latest() == 2


@pytest.mark.parametrize(
    "steps, skipped, stops_at",
    [
        (40, {3: 1.0, 9: 1.0, 30: 1.0}, None),
        (40, dict.fromkeys(range(10), 1.0), None),  # half of the last 20, and no more
        (40, dict.fromkeys(range(20, 40), 0.6), 36),  # 17 times 0.6 is more than 10
        (40, dict.fromkeys(range(40), 1.0), 10),
        (3, {0: 1.0, 2: 1.0}, 2),
    ],
)
def test_a_run_stops_once_most_of_its_updates_were_left_out(steps, skipped, stops_at):
    seen = []
    check = loop.limit_skips(lambda step, metrics: seen.append(step), steps)
    for step in range(steps):
        metrics = {"skipped_updates": skipped.get(step, 0.0)} if skipped else {}
        if step == stops_at:
            with pytest.raises(TrainingStopped, match=f"step {step}: .* were left out; lower the"):
                check(step, metrics)
            break
        check(step, metrics)
    assert seen == list(range(steps if stops_at is None else stops_at + 1))


def test_a_loop_that_leaves_out_every_update_stops_and_saves_none_of_them(tmp_path):
    def step(state, batch):
        metrics = {"loss": jnp.nan, "bad_step": jnp.int32(-1), "skipped_updates": jnp.float32(1)}
        return state, loop.Outcome(metrics, jnp.int32(1))

    with Recorded(tmp_path, events := []) as checkpoints:
        runtime = tiny.runtime(checkpoints=checkpoints)
        plan = Plan("task", DISPLAY, 8, 5)
        with pytest.raises(
            TrainingStopped, match="step 4: 100% of the updates of the last 5 steps"
        ):
            loop.train(step, {"count": jnp.int32(0)}, Numbers(), plan, runtime)
    assert events == []


# ------------------------------------------------------------------------------ held-out evaluation

RUNS = {
    "sft": (sft.run, tiny.SFT, tiny.demonstrations),
    "reward_model": (reward_model.run, tiny.REWARD_MODEL, tiny.comparisons),
}


@pytest.mark.parametrize("stage", RUNS)
def test_held_out_figures_stand_in_the_history_where_they_were_asked_for(stage):
    run, config, data = RUNS[stage]
    config = dataclasses.replace(config, eval_every=4)
    held_out = data(batch_size=8, seed=1)
    result = run(config, tiny.model(), data(), held_out=held_out, runtime=tiny.runtime())
    lines = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in result.history]
    assert [bool(line) for line in lines] == [False, False, False, True, False, True]
    trained, evaluate = {
        "sft": (result[0], sft.evaluate),
        "reward_model": (result[0], reward_model.evaluate),
    }[stage]
    expected = evaluate(config, trained, held_out, mesh=tiny.mesh())
    assert lines[-1] == {f"eval/{name}": value for name, value in expected.items()}
    assert lines[3]["eval/loss"] > lines[5]["eval/loss"]
    assert ("accuracy" in expected) is (stage == "reward_model")


@pytest.mark.parametrize("stage", RUNS)
def test_an_evaluation_that_never_runs_and_one_without_data_are_refused(stage):
    run, config, data = RUNS[stage]
    with pytest.raises(ValueError, match="held-out evaluation is given, but eval_every=0 never"):
        run(config, tiny.model(), data(), held_out=data(), runtime=tiny.runtime())
    config = dataclasses.replace(config, eval_every=2)
    with pytest.raises(ValueError, match="eval_every=2, but there is nothing to evaluate on"):
        run(config, tiny.model(), data(), runtime=tiny.runtime())


# --------------------------------------------------- a supervised algorithm with a frozen reference


class DpoConfig(loop.Config):
    """Settings of DPO (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Positive = 0.1


def dpo_loss(config, params, batch):
    """-log sigmoid(beta * (gain of the best - gain of the other)); gain: log p - log p_ref."""

    def nats(model):
        rows, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
        attend = batch.attend.reshape(rows.shape)
        hidden = transformer.hidden_states(model, rows, attend)
        logprobs, _ = heads.token_logprobs(model, hidden, rows)
        return jnp.sum(logprobs * mask, axis=1).reshape(batch.ranks.shape)

    gain = config.beta * (nats(params["policy"]) - nats(params["reference"]))
    chosen = jnp.sum(gain * (batch.ranks == 0), axis=1)
    rejected = jnp.sum(gain * (batch.ranks == 1), axis=1)
    metrics = {"gap": jnp.mean(chosen - rejected)}
    return jnp.mean(losses.rank_loss(chosen=chosen, rejected=rejected)), metrics


DPO = DpoConfig(num_steps=4, batch_size=8, optimizer=tiny.ADAM, save_every=2)


def run_dpo(policy, checkpoints=None, mesh="1x1x1", **changes):
    arguments = {"frozen": {"reference": policy}, "loss_fn": dpo_loss} | changes
    return loop.fit(
        DPO,
        {"policy": policy},
        tiny.comparisons(),
        name="dpo",
        display=DISPLAY,
        runtime=tiny.runtime(mesh, checkpoints),
        **arguments,
    )


def test_a_loss_reads_a_frozen_reference_which_is_neither_trained_nor_saved(tmp_path):
    policy = tiny.model()
    before = jax.device_get(policy)
    with Recorded(tmp_path, []) as checkpoints:
        params, history = run_dpo(policy, checkpoints)
    # At first the policy is the reference: the loss is log 2, and the gradient is not 0.
    assert history[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert abs(history[0]["gap"]) < 1e-6 and history[0]["grad_norm"] > 0.01
    assert history[-1]["loss"] < 0.6 and history[-1]["gap"] > 0.1
    assert tiny.equal(params["reference"], before) and tiny.equal(policy, before)
    assert tiny.distance(params["policy"], before) > 0.1
    # One network, its two moments in Adam, and a few counts: no room for a reference.
    one = sum(leaf.size for leaf in jax.tree.leaves(before))
    assert [size // one for size in checkpoints.sizes] == [3, 3]


def test_a_frozen_reference_is_the_same_on_a_mesh():
    alone, history = run_dpo(tiny.model())
    split, others = run_dpo(tiny.model("2x2x2"), mesh="2x2x2")
    expected = [line["loss"] for line in history]
    np.testing.assert_allclose([line["loss"] for line in others], expected, rtol=1e-5)
    moved = tiny.distance(alone["policy"], alone["reference"])
    assert tiny.distance(split["policy"], alone["policy"]) < 1e-3 * moved


def test_one_name_for_a_trained_and_a_frozen_model_is_refused():
    policy = tiny.model()
    with pytest.raises(ValueError, match="'policy' cannot be trained and frozen at once"):
        run_dpo(policy, frozen={"policy": policy})


def test_a_loss_without_metrics_is_refused_by_its_name():
    def only_a_number(config, params, batch):
        return dpo_loss(config, params, batch)[0]

    def of_rows(config, params, batch):
        return batch.margin, {}

    for loss, found in (
        (only_a_number, r"an array of shape \[\]"),
        (of_rows, r"an .* \[8\], dict"),
    ):
        message = rf"a loss returns \(scalar, metrics\), but {loss.__name__} returned {found}"
        with pytest.raises(ValueError, match=message):
            run_dpo(tiny.model(), loss_fn=loss)


# ------------------------------------------------------------------- compiled programs, across runs


def test_fine_tuning_runs_that_differ_in_a_rate_share_their_programs(caplog):
    ours = ("jit(_step)", "jit(init_state)")

    def counts(rate):
        optimizer = dataclasses.replace(tiny.ADAM, learning_rate=rate)
        config = dataclasses.replace(tiny.SFT, num_steps=3, save_every=7, optimizer=optimizer)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            sft.run(config, tiny.model(), tiny.demonstrations(), runtime=tiny.runtime())
        lines = [record.getMessage() for record in caplog.records]
        lines = [line for line in lines if "Finished XLA compilation" in line]
        return {name: sum(name in line for line in lines) for name in ours}

    assert counts(1e-3) == dict.fromkeys(ours, 1)
    assert counts(2e-3) == dict.fromkeys(ours, 0)


def test_the_same_function_and_shardings_give_the_same_program():
    mesh = tiny.mesh()

    def program(scale, fn=sft.loss):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return loop.compiled(fn, (scale,), in_shardings=sharding, out_shardings=sharding)

    assert program(1) is program(1)
    assert program(1) is not program(2) and program(1) is not program(1, reward_model.loss)


# ----------------------------------------------------------------------- every row of a loader once


def lengths(scale, batch):
    return {"length": scale * jnp.sum(batch.attend > 0, axis=1), "tokens": batch.tokens}


def total(scale, batch):
    return scale * jnp.sum(batch.mask), jnp.sum(batch.attend > 0)


@pytest.mark.parametrize("batch_size", [8, 16, 24])  # of 12 rows
def test_an_epoch_counts_every_row_once_in_order_and_no_padding(batch_size):
    loader = tiny.demonstrations(batch_size)
    examples = [loader.examples[i] for i in range(len(tiny.WORDS))]
    found = epoch.rows(lengths, (2,), (), loader)
    assert found["length"].tolist() == [2 * int(np.sum(x.attend > 0)) for x in examples]
    np.testing.assert_array_equal(found["tokens"], [x.tokens for x in examples])
    trained, real = epoch.sums(total, (3,), (), loader)
    assert trained == 3 * sum(np.sum(x.mask) for x in examples)
    assert real == sum(np.sum(x.attend > 0) for x in examples)
