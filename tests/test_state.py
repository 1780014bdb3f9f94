"""Configurations, the optimizer against torch, schedules, the gradient step, running moments."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import online
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.state import OptimizerConfig

NEEDS_TORCH = "needs torch, an optional extra, as an oracle"


# -------------------------------------------------------------------------------------- the steps


def test_the_training_step_compiles_once_for_all_learning_rates():
    traces = []

    @jax.jit
    def step(config, state, batch):
        traces.append(config)
        optimizer = training.make_optimizer(config, 10)
        return training.gradient_step(quadratic, optimizer, state, {}, batch)

    config = OptimizerConfig(schedule="constant")
    state = training.init_state(training.make_optimizer(config, 10), {"w": jnp.ones((2, 2))})
    moved = {}
    for rate in (1e-3, 2e-3):
        changed = dataclasses.replace(config, learning_rate=rate)
        new, _ = step(changed, state, jnp.float32(1.0))
        moved[rate] = 1.0 - float(new.trainable["w"][0, 0])
    assert len(traces) == 1
    assert moved[2e-3] == pytest.approx(2 * moved[1e-3], rel=1e-3)


def test_a_sweep_over_learning_rates_is_one_vmapped_program():
    rates = jnp.array([0.1, 0.2])
    configs = jax.vmap(lambda rate: OptimizerConfig(learning_rate=rate))(rates)
    final = jax.vmap(lambda config: training.schedule(config, 4)(3))(configs)
    np.testing.assert_allclose(final, rates / 4, rtol=1e-6)


# -------------------------------------------------------------------------------------- optimizers


def quadratic(params, target):
    """A loss over a tree of any depth, and a metric."""
    loss = sum(jnp.sum(jnp.square(x - target)) for x in jax.tree.leaves(params))
    return loss, {"target": target}


def trajectory(config, params, gradients, num_steps=100):
    """Parameters after each of the given gradients."""
    optimizer = training.make_optimizer(config, num_steps)
    opt_state, seen = optimizer.init(params), []
    advance = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, opt_state = advance(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def random_gradients(count, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "scale": (4,)}

    def tree(scale):
        drawn = {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}
        return {name: jnp.asarray(values, jnp.float32) for name, values in drawn.items()}

    return tree(1.0), [tree(scale) for _ in range(count)]


@pytest.mark.parametrize("max_grad_norm", [1e9, 1.0])
def test_the_torch_form_is_torch_adamw_with_decay_on_matrices_only(max_grad_norm):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    config = OptimizerConfig(
        learning_rate=0.03,
        schedule="constant",
        eps=1e-3,
        b1=0.8,
        b2=0.95,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
    )
    params, gradients = random_gradients(6)
    theirs = {k: torch.tensor(v.tolist(), requires_grad=True) for k, v in params.items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": 0.1},
        {"params": [theirs["scale"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.03, eps=1e-3, betas=(0.8, 0.95))
    for ours, gradient in zip(trajectory(config, params, gradients), gradients):
        for name, leaf in theirs.items():
            leaf.grad = torch.tensor(gradient[name].tolist())
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_grad_norm)
        adamw.step()
        for name, leaf in theirs.items():
            np.testing.assert_allclose(ours[name], leaf.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_both_forms_of_adam_coincide_where_the_torch_epsilon_follows_the_correction():
    params, gradients = random_gradients(5, scale=1e-2)
    eps = 1e-3

    def walk(form, eps_at):
        config = OptimizerConfig(schedule="constant", eps_form=form, max_grad_norm=1e9)
        moments = training.make_optimizer(config, 100).init(params)
        taken = []
        for t, gradient in enumerate(gradients, start=1):
            step = dataclasses.replace(config, eps=eps_at(t))
            optimizer = training.make_optimizer(step, 100)
            updates, moments = jax.jit(optimizer.update)(gradient, moments, params)
            taken.append(updates)
        return taken

    tf = walk("tf", lambda t: eps)
    same = walk("torch", lambda t: eps / math.sqrt(1.0 - 0.999**t))
    other = walk("torch", lambda t: eps)
    for a, b in zip(jax.tree.leaves(tf), jax.tree.leaves(same)):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    # With one epsilon for both the first step of the torch form is far larger.
    first = [float(jnp.mean(jnp.abs(steps[0]["kernel"]))) for steps in (tf, other)]
    assert first[1] > 3 * first[0]


def test_the_tf_form_is_the_formula_of_kingma_and_ba_with_epsilon_hat():
    params, gradients = random_gradients(4)
    b1, b2, eps, rate = 0.8, 0.95, 1e-2, 0.03
    config = OptimizerConfig(
        learning_rate=rate,
        schedule="constant",
        eps=eps,
        eps_form="tf",
        b1=b1,
        b2=b2,
        max_grad_norm=1e9,
    )
    x = np.asarray(params["kernel"], np.float64)
    m = v = np.zeros_like(x)
    for t, (ours, g) in enumerate(zip(trajectory(config, params, gradients), gradients), start=1):
        g = np.asarray(g["kernel"], np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = x - rate * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        np.testing.assert_allclose(ours["kernel"], x, rtol=1e-5, atol=1e-6)


def test_clipping_is_by_the_norm_of_all_parameters_together():
    # Gradient norm 5 over two leaves; Adam with eps 1e9 is close to a plain gradient step.
    gradient = {"a": jnp.array([[3.0]]), "b": jnp.array([4.0])}
    zero = jax.tree.map(jnp.zeros_like, gradient)
    config = OptimizerConfig(
        learning_rate=1e9, schedule="constant", eps=1e9, b1=0.0, b2=0.0, max_grad_norm=1.0
    )
    (moved,) = trajectory(config, zero, [gradient])
    np.testing.assert_allclose(moved["a"], [[-0.6]], rtol=1e-5)
    np.testing.assert_allclose(moved["b"], [-0.8], rtol=1e-5)


# --------------------------------------------------------------------------------------- schedules


def rates(config, num_steps):
    return np.asarray(jax.vmap(training.schedule(config, num_steps))(jnp.arange(num_steps)))


@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_a_linear_schedule_falls_and_leaves_the_last_update_one_nth(num_steps):
    values = rates(OptimizerConfig(learning_rate=0.25), num_steps)
    assert values[0] == 0.25
    assert values[-1] == pytest.approx(0.25 / num_steps, abs=1e-7)
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_schedules_are_those_of_transformers(name, warmup):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    kind = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    config = OptimizerConfig(learning_rate=0.5, schedule=name, warmup_steps=warmup)
    np.testing.assert_allclose(rates(config, 10), expected, rtol=1e-5, atol=1e-8)


def test_the_decay_ends_at_the_final_scale_and_stays_there():
    for name in ("linear", "cosine"):
        config = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=2, final_scale=0.25)
        rate = training.schedule(config, 10)
        assert rate(2) == pytest.approx(2.0)
        assert rate(6) == pytest.approx((2.0 + 0.5) / 2)  # half way, both shapes are half down
        assert rate(10) == pytest.approx(0.5) and rate(50) == pytest.approx(0.5)


def test_the_optimizer_follows_its_schedule():
    # With the same gradient every time Adam moves by the rate itself.
    params, (gradient,) = {"w": jnp.zeros((1, 1))}, [{"w": jnp.ones((1, 1))}]
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, max_grad_norm=1e9)
    seen = trajectory(config, params, [gradient] * 6, num_steps=6)
    moved = -np.diff([0.0, *(float(p["w"][0, 0]) for p in seen)])
    np.testing.assert_allclose(moved, [0.0, 0.25, 0.5, 0.375, 0.25, 0.125], rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------- the gradient step


REFERENCE = {"reference": {"kernel": np.full((2, 2), 3.0, np.float32)}}


def fresh_state(config):
    optimizer = training.make_optimizer(config, 10)
    trainable = {"policy": {"kernel": jnp.full((2, 2), 1.5), "scale": jnp.ones(2)}}
    return optimizer, training.init_state(optimizer, trainable)


def pulled(params, batch):
    """The policy towards the reference; the batch multiplies the loss."""
    gap = params["policy"]["kernel"] - params["reference"]["kernel"]
    loss = batch * (jnp.sum(jnp.square(gap)) + jnp.sum(params["policy"]["scale"]))
    return loss, {"gap": jnp.sum(gap)}


def same(a, b):
    """Bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def test_a_step_moves_only_what_is_trainable_and_reports_loss_and_norm():
    config = OptimizerConfig(learning_rate=0.1)
    optimizer, state = fresh_state(config)
    new, metrics = training.gradient_step(pulled, optimizer, state, REFERENCE, jnp.float32(2.0))
    assert jax.tree.structure(new) == jax.tree.structure(state)  # the reference is no part of it
    assert not same(new.trainable, state.trainable)
    # d/dx 2 (x - 3)^2 = -6 four times, d/ds 2 s = 2 twice.
    assert metrics["loss"] == pytest.approx(2 * (4 * 1.5**2 + 2))
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(4 * 36 + 2 * 4), rel=1e-6)
    assert metrics["gap"] == pytest.approx(-6.0)
    assert int(new.step) == 1 and int(new.bad_step) == -1 == int(metrics["bad_step"])
    # The optimizer keeps no moments of the frozen model.
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= 2 * 6 + 2, sizes


def test_each_network_is_clipped_by_its_own_norm_and_both_norms_are_logged():
    weights = {"policy": {"w": jnp.ones((1, 2))}, "critic": {"w": jnp.ones((1, 3))}}
    plain = OptimizerConfig(
        learning_rate=1e9, schedule="constant", eps=1e9, b1=0.0, b2=0.0, max_grad_norm=1.0
    )

    def loss(params, batch):
        return 3.0 * jnp.sum(params["policy"]["w"]) + 0.1 * jnp.sum(params["critic"]["w"]), {}

    class Both(online.Config):
        def optimizers(self):
            return {"policy": plain, "critic": plain}

    optimizer = online.make_optimizer(Both())
    state = training.init_state(optimizer, weights)
    new, metrics = training.gradient_step(loss, optimizer, state, {}, None)
    norms = {"policy": 3.0 * math.sqrt(2), "critic": 0.1 * math.sqrt(3)}
    assert metrics["grad_norm/policy"] == pytest.approx(norms["policy"], rel=1e-6)
    assert metrics["grad_norm/critic"] == pytest.approx(norms["critic"], rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-6)
    # Nearly plain gradient steps: the policy's is cut to norm 1, the critic's is left as it is.
    np.testing.assert_allclose(new.trainable["policy"]["w"], 1 - 1 / math.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(new.trainable["critic"]["w"], 0.9, rtol=1e-5)


def test_without_a_largest_norm_nothing_is_clipped():
    gradient = {"a": jnp.array([[3.0]])}
    config = OptimizerConfig(
        learning_rate=1e9, schedule="constant", eps=1e9, b1=0.0, b2=0.0, max_grad_norm=None
    )
    (moved,) = trajectory(config, jax.tree.map(jnp.zeros_like, gradient), [gradient])
    np.testing.assert_allclose(moved["a"], [[-3.0]], rtol=1e-5)
    with pytest.raises(ValueError, match="max_grad_norm=0.0 must be"):
        OptimizerConfig(max_grad_norm=0.0)


def test_the_state_holds_a_copy_of_what_it_was_given():
    weights = {"w": jnp.ones((2, 2))}
    state = training.init_state(training.make_optimizer(OptimizerConfig(), 10), weights)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    np.testing.assert_array_equal(weights["w"], np.ones((2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_loss_keeps_the_state_bit_for_bit_and_freezes_it(bad):
    optimizer, state = fresh_state(OptimizerConfig(learning_rate=0.1))
    step = jax.jit(lambda s, b: training.gradient_step(pulled, optimizer, s, REFERENCE, b))
    good, _ = step(state, jnp.float32(1.0))
    broken, metrics = step(good, jnp.float32(bad))
    assert same(broken._replace(bad_step=good.bad_step), good)
    assert int(broken.bad_step) == 1 == int(metrics["bad_step"])  # the second update
    # A good batch afterwards changes nothing any more, and the first bad update stays named.
    for batch in (1.0, bad):
        after, metrics = step(broken, jnp.float32(batch))
        assert same(after, broken) and int(metrics["bad_step"]) == 1


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_caught_too():
    optimizer, state = fresh_state(OptimizerConfig())

    def loss(params, batch):
        # sqrt(0) = 0 but its derivative is infinite.
        return jnp.sqrt(jnp.sum(params["policy"]["scale"]) - 2.0) * batch, {}

    new, metrics = training.gradient_step(loss, optimizer, state, {}, jnp.float32(1.0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert int(new.bad_step) == 0 and same(new.trainable, state.trainable)


def test_an_update_that_is_not_finite_after_a_finite_gradient_is_caught_too():
    optimizer, state = fresh_state(OptimizerConfig(learning_rate=0.1))
    broken = optax.chain(optimizer, optax.stateless(lambda u, p: jax.tree.map(jnp.log, u)))
    state = state._replace(opt_state=broken.init(state.trainable))
    new, metrics = training.gradient_step(pulled, broken, state, REFERENCE, jnp.float32(1.0))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert int(new.bad_step) == 0 and same(new.trainable, state.trainable)
    assert same(new.opt_state, state.opt_state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_updates_may_be_left_out_and_counted(bad):
    optimizer, state = fresh_state(OptimizerConfig(learning_rate=0.1))

    @jax.jit
    def step(state, batch):
        return training.gradient_step(pulled, optimizer, state, REFERENCE, batch, skip=True)

    good, metrics = step(state, jnp.float32(1.0))
    assert float(metrics["skipped_updates"]) == 0.0
    left_out, metrics = step(good, jnp.float32(bad))
    assert same(left_out, good) and float(metrics["skipped_updates"]) == 1.0
    assert int(metrics["bad_step"]) == -1
    after, _ = step(left_out, jnp.float32(2.0))
    assert same(after, step(good, jnp.float32(2.0))[0]) and int(after.step) == 2


@pytest.mark.parametrize(
    "metrics, what",
    [
        ({"loss": np.nan, "grad_norm": np.nan}, "loss"),
        ({"loss": 1.0, "grad_norm": np.inf}, "gradient"),
        ({"loss": 1.0, "grad_norm": 1.0}, "change of the parameters"),
    ],
)
def test_the_host_stops_at_a_bad_step_and_names_it(metrics, what):
    training.raise_if_bad(5, {"bad_step": -1.0, **metrics})
    with pytest.raises(training.TrainingStopped, match=rf"non-finite {what} at update 3:"):
        training.raise_if_bad(5, {"bad_step": 3.0, **metrics})


def test_a_supervised_update_logs_the_rate_it_used():
    config = loop.Config(optimizer=OptimizerConfig(learning_rate=0.5), num_steps=4)

    def loss(config, params, batch):
        return quadratic(params, batch)

    _, state = fresh_state(config.optimizer)
    logged = []
    for _ in range(4):
        state, metrics = loop.update(loss, config, state, {}, jnp.float32(0.0))
        logged.append(float(metrics["lr"]))
    np.testing.assert_allclose(logged, [0.5, 0.375, 0.25, 0.125], rtol=1e-6)


# --------------------------------------------------------------------------------- running moments


def test_running_moments_are_those_of_all_scores_together():
    rng = np.random.default_rng(1)
    batches = [rng.normal(100.0, 0.5, size) for size in (1, 4, 7, 2)]
    moments, seen = training.RunningMoments.empty(), np.zeros(0)
    assert moments.std == 0
    for batch in batches:
        moments = moments.push(jnp.asarray(batch, jnp.float32))
        seen = np.append(seen, batch)
        assert int(moments.count) == len(seen)
        np.testing.assert_allclose(moments.mean, seen.mean(), rtol=1e-6)
        # A mean of 100 costs a sum of squares in float32 four digits; Welford's form keeps them.
        np.testing.assert_allclose(moments.std, seen.std(), rtol=1e-3, atol=1e-5)
