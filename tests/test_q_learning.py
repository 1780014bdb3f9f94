"""Q-learning against dynamic programming on a tree, and decoding by action values."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax import advantages, folders, losses, sharding, texts
from rlhf_jax.algorithms import q_learning
from rlhf_jax.data import batches
from rlhf_jax.data.records import Comparisons
from rlhf_jax.models import action_values, lora, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards.episodes import Episodes
from rlhf_jax.sampling import Sampling, decode
from rlhf_jax.sampling.decode import Guide
from rlhf_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compile_cache")
METHODS = {
    "ilql": q_learning.ILQL,
    "double_dqn": q_learning.DOUBLE_DQN,
    "soft_q": q_learning.SOFT_Q,
    "paths": q_learning.SOFT_Q_PATHS,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

# ------------------------------------------------------------------- a tree that can be enumerated

ACTIONS, DEPTH = 6, 4
LEAVES = np.array(list(itertools.product(range(ACTIONS), repeat=DEPTH)))
PREFIXES = [p for n in range(DEPTH) for p in itertools.product(range(ACTIONS), repeat=n)]
STATE = {prefix: i for i, prefix in enumerate(PREFIXES)}
SCORES = np.random.default_rng(0).normal(size=len(LEAVES))
POLICY = np.random.default_rng(1).normal(size=(len(PREFIXES), ACTIONS))  # logits
CONFIG = q_learning.Config(target_decay=0.9, beta=0.5, top_k=3, cql_weight=0.0)


def tree_batch():
    """All leaves once, after a prompt of one token: a dataset of a uniform policy."""
    tokens = np.concatenate([np.zeros((len(LEAVES), 1), int), LEAVES], axis=1)[:, None]
    mask = np.concatenate([np.zeros((len(LEAVES), 1)), np.ones(LEAVES.shape)], axis=1)[:, None]
    ones = np.ones((len(LEAVES), 1))
    return Comparisons(
        jnp.asarray(tokens, jnp.int32),
        jnp.ones(tokens.shape, jnp.int32),
        jnp.asarray(mask, jnp.float32),
        jnp.zeros(ones.shape, jnp.int32),
        jnp.asarray(ones, jnp.float32),
        jnp.zeros(len(LEAVES)),
        jnp.asarray(SCORES[:, None], jnp.float32),
    )


def states():
    """The number of the state after each token, [N, T]; of the leaves, 0."""
    rows = [[STATE[tuple(leaf[:n])] for n in range(DEPTH)] + [0] for leaf in LEAVES]
    return jnp.asarray(rows)


@pytest.fixture
def tables(monkeypatch):
    """Networks whose hidden state is the number of the state, so that their heads are tables."""
    shape = dataclasses.replace(tiny.SHAPE, vocab_size=ACTIONS, d_model=len(PREFIXES))
    hidden = jax.nn.one_hot(states(), len(PREFIXES))
    monkeypatch.setattr(transformer, "hidden_states", lambda model, tokens, attend: hidden)
    policy = Model(shape, {"head": {"kernel": jnp.asarray(POLICY, jnp.float32)}})
    return policy


def learn(config, method, policy, steps):
    """The network after `steps` updates on the whole tree, its target following."""
    network = method.network(policy, jax.random.key(0))
    rate = optax.cosine_decay_schedule(0.1, steps)
    batch, optimizer = tree_batch(), optax.adam(rate)

    def step(carry, _):
        network, target, state = carry

        def loss(network):
            params = {"network": network, "target": target, "policy": policy}
            return method.loss(config, params, batch)[0]

        updates, state = optimizer.update(jax.grad(loss)(network), state)
        network = optax.apply_updates(network, updates)
        target = jax.tree.map(
            lambda old, new: new + config.target_decay * (old - new), target, network
        )
        return (network, target, state), None

    @jax.jit
    def run():
        start = (network, network, optimizer.init(network))
        return jax.lax.scan(step, start, length=steps)[0][0]

    return run()


def backwards(value):
    """Q by dynamic programming, [S, A]; `value(state number, Q of its actions)` -> V."""
    q = np.zeros((len(PREFIXES), ACTIONS))
    score = {tuple(leaf): s for leaf, s in zip(LEAVES, SCORES)}
    for prefix in reversed(PREFIXES):
        for action in range(ACTIONS):
            after = (*prefix, action)
            if after in score:
                q[STATE[prefix], action] = score[after]
            else:
                q[STATE[prefix], action] = value(STATE[after], q[STATE[after]])
    return q


def soft(state, q):
    logp = POLICY[state] - np.log(np.sum(np.exp(POLICY[state])))
    return CONFIG.beta * np.log(np.sum(np.exp(logp + q / CONFIG.beta)))


def best_of_likely(state, q):
    return q[np.argsort(-POLICY[state])[: CONFIG.top_k]].max()


def expectile(_, q):
    """Where 0.7 of the excess is below: the root of its weighted residuals, by bisection."""
    low, high = q.min(), q.max()
    for _ in range(80):
        v = (low + high) / 2
        weights = np.where(q < v, 1 - CONFIG.expectile, CONFIG.expectile)
        low, high = (v, high) if np.sum(weights * (q - v)) > 0 else (low, v)
    return v


@pytest.mark.parametrize(
    ("method", "value"),
    [
        (q_learning.SOFT_Q, soft),
        (q_learning.SOFT_Q_PATHS, soft),
        (q_learning.DOUBLE_DQN, best_of_likely),
        (q_learning.ILQL, expectile),
    ],
    ids=["soft", "paths", "double_dqn", "ilql"],
)
def test_each_method_finds_the_values_of_dynamic_programming(
    tables, method, value, no_shape_checks
):
    network = learn(CONFIG, method, tables, 1500)
    wanted = backwards(value)
    for kernel in action_values.kernels(network):
        np.testing.assert_allclose(kernel, wanted, atol=1e-3)
    if "score" in network.weights:
        found = network.weights["score"]["kernel"][:, 0] + network.weights["score"]["bias"]
        np.testing.assert_allclose(found, [value(s, q) for s, q in enumerate(wanted)], atol=1e-3)


def test_the_table_of_q_learning_converges_to_dynamic_programming():
    starts = [[STATE[tuple(leaf[:n])] for n in range(DEPTH)] for leaf in LEAVES]
    after = [[*row[1:], -1] for row in starts]
    rewards = np.pad(SCORES[:, None], ((0, 0), (DEPTH - 1, 0)))
    order = np.random.default_rng(2).permutation(LEAVES.size)
    columns = (starts, LEAVES, rewards, after)
    transitions = tuple(jnp.asarray(np.ravel(x)[order]) for x in columns)
    learn = jax.jit(lambda table: q_learning.tabular(table, transitions, rate=0.9, discount=0.8))
    table = jnp.zeros((len(PREFIXES), ACTIONS))
    for _ in range(12):
        table = learn(table)
    np.testing.assert_allclose(table, backwards(lambda s, q: 0.8 * q.max()), atol=1e-3)


def test_the_value_of_the_next_state_stands_one_token_before_and_nothing_follows_the_last():
    values = jnp.array([[9.0, 1.0, 2.0, 3.0, 9.0]])
    mask = jnp.array([[0.0, 1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(advantages.of_next(values, mask), [[0, 2, 3, 0, 0]])
    rows = Episodes(None, None, mask, jnp.array([[0.0, 0.0, 0.0, 5.0, 0.0]]))
    for share, wanted in ((0.0, [1.0, 1.5, 5.0]), (1.0, [1.25, 2.5, 5.0])):
        config = q_learning.Config(discount=0.5, monte_carlo=share)
        found = q_learning.targets(config, rows, values)
        np.testing.assert_allclose(found[0, 1:4], wanted)


def test_targets_of_paths_are_the_score_minus_later_advantages():
    mask = jnp.array([[0.0, 1.0, 1.0, 1.0, 0.0]])
    rows = Episodes(None, None, mask, jnp.array([[0.0, 0.0, 0.0, 5.0, 0.0]]))
    q = jnp.array([[7.0, 1.0, 2.0, 4.0, jnp.nan]])
    values = jnp.array([[7.0, 0.5, 1.0, 1.5, jnp.nan]])
    found = q_learning.path_targets(rows, q, values)
    # 5 - (2 - 1) - (4 - 1.5), then 5 - (4 - 1.5), then 5.
    np.testing.assert_allclose(found[0, 1:4], [1.5, 2.5, 5.0])


def test_the_expectile_loss_weighs_what_lies_above_more():
    found = q_learning.expectile_loss(
        values=jnp.array([1.0, 1.0]), samples=jnp.array([3.0, -1.0]), expectile=0.7
    )
    np.testing.assert_allclose(found, [0.7 * 4, 0.3 * 4], rtol=1e-6)


def test_double_dqn_takes_the_value_of_the_target_for_what_the_network_prefers(tables):
    """On two states: the network's best of the policy's top two, priced by the target."""
    states = jnp.eye(tables.config.d_model)[None, :3]
    rng = np.random.default_rng(3)
    q, target = (jnp.asarray(rng.normal(size=POLICY.shape), jnp.float32) for _ in range(2))
    models = [Model(tables.config, {"q": {"kernel": x}}) for x in (q, target)]
    found = action_values.limited_best(tables, *models, (states,) * 3, jnp.zeros((1, 3), int), 2)
    for n in range(2):
        likely = np.argsort(-POLICY[n])[:2]
        best = likely[np.argmax(q[n][likely])]
        assert found[0, n + 1] == target[n][best]


# ------------------------------------------------------------------------------------ decoding


def guided(mesh="1x1x1", twin=True, scale=0.3):
    """A policy and a network whose values differ from token to token."""
    policy = tiny.model(mesh)
    made = action_values.twin if twin else action_values.single
    network = made(tiny.model(seed=1), jax.random.key(2))
    for i, name in enumerate(("q", "twin")[: 1 + twin]):
        noise = jax.random.normal(jax.random.key(i), network.weights[name]["kernel"].shape)
        network.weights[name]["kernel"] = scale * noise
    return policy, network


def drawn(policy, guide, count=16, temperature=1.0):
    prompts = jax.tree.map(jnp.asarray, tiny.prompts(count).batch(0))
    keys = decode.row_keys(jax.random.key(0), prompts.index)
    return jax.jit(
        lambda policy, guide: decode.sample(
            policy,
            prompts.tokens,
            prompts.attend,
            keys,
            sampling=Sampling(max_new_tokens=6, temperature=temperature),
            ends=tiny.TOKENIZER.ends,
            guide=guide,
        )
    )(policy, guide)


@pytest.mark.parametrize("twin", [False, True])
def test_tokens_are_drawn_from_the_policy_tilted_by_the_lower_of_the_values(twin):
    policy, network = guided(twin=twin)
    samples = drawn(policy, Guide(network, 1.5))
    hiddens = [
        transformer.hidden_states(x, samples.tokens, samples.attend) for x in (policy, network)
    ]
    kernels = [network.weights[x]["kernel"] for x in ("q", "twin")[: 1 + twin]]
    values = np.min([hiddens[1] @ kernel for kernel in kernels], axis=0)
    logits = transformer.logits(policy, hiddens[0]) + 1.5 * values
    wanted = losses.token_logprobs(logits, samples.tokens) * samples.mask
    assert np.std(values) > 0.5
    np.testing.assert_allclose(samples.logprobs, wanted, atol=2e-5)


def test_without_weight_or_values_the_policy_itself_is_drawn():
    policy, network = guided()
    alone = drawn(policy, None)
    untrained = action_values.twin(policy, jax.random.key(0))
    untrained.weights["twin"]["kernel"] *= 0
    for guide in (Guide(network, 0.0), Guide(untrained, 8.0)):
        assert tiny.equal(drawn(policy, guide), alone)
    assert not np.array_equal(drawn(policy, Guide(network, 1.5)).tokens, alone.tokens)


@pytest.mark.parametrize("mesh", ["2x2x2", "1x2x4"])
def test_guided_tokens_are_the_same_on_every_mesh(mesh):
    alone = drawn(guided()[0], Guide(guided()[1], 1.5))
    policy, network = guided(mesh)
    with jax.set_mesh(tiny.mesh(mesh)):
        network = sharding.place(tiny.mesh(mesh), network)
        split = drawn(policy, Guide(network, 1.5))
    np.testing.assert_array_equal(split.tokens, alone.tokens)
    np.testing.assert_allclose(split.logprobs, alone.logprobs, atol=1e-4)


def test_a_text_is_answered_by_a_guide():
    policy, network = guided(scale=2.0)
    how = {"sampling": Sampling(max_new_tokens=6), "progress": False}
    asked = ["ab", "cd", "efg"]
    alone = texts.generate(policy, tiny.TOKENIZER, asked, **how)
    tilted = texts.generate(policy, tiny.TOKENIZER, asked, guide=Guide(network, 1.0), **how)
    assert tilted != alone
    again = texts.generate(policy, tiny.TOKENIZER, asked, guide=Guide(network, 0.0), **how)
    assert again == alone


# ---------------------------------------------------------------------------------------- runs

RUN = q_learning.Config(num_steps=4, batch_size=8, optimizer=tiny.ADAM, save_every=1)


def answers(batch_size=8):
    """Two answers to each prompt: the word itself scores 1, its first letters 0."""
    rows = [
        {"prompt": word, "responses": [word, word[:1] + "z"], "scores": [1.0, 0.0]}
        for word in tiny.WORDS
    ]
    return batches.Loader(batches.scored(rows, tiny.TOKENIZER, 4, 5), batch_size)


def run(config=RUN, mesh="1x1x1", checkpoints=None, policy=None, data=None, **options):
    return q_learning.run(
        config,
        policy or tiny.model(mesh),
        data or answers(config.batch_size),
        runtime=tiny.runtime(mesh, checkpoints),
        **options,
    )


@pytest.fixture(scope="module")
def trained():
    return run()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if name == "soft_q" else pytest.mark.slow)
        for name, method in METHODS.items()
    ],
    ids=METHODS,
)
def test_the_values_of_every_method_raise_the_score(method):
    """2,048 responses of the policy, of which half of the tokens count, and 50 updates on them."""
    policy = tiny.model()
    samples = drawn(policy, None, count=2048)
    rows = (samples.tokens, samples.attend, samples.mask)
    scores = tiny.share_below_128(None, *rows)
    ones = jnp.ones((2048, 1))
    batch = Comparisons(
        *(x[:, None] for x in rows), ones.astype(int), ones, ones[:, 0], scores[:, None]
    )
    config = q_learning.Config(
        num_steps=50,
        optimizer=tiny.ADAM,
        target_decay=0.9,
        monte_carlo=0.5,
        cql_weight=0.01,
        beta=0.2,
        top_k=264,
    )
    start = q_learning.init_state(config, {"network": method.network(policy, jax.random.key(0))})

    @jax.jit
    def learn(state):
        def step(state, _):
            return q_learning.update(method.loss, config, state, {"policy": policy}, batch)

        return jax.lax.scan(step, state, length=50)

    state, metrics = learn(start)
    assert metrics["q/error"][-1] < 0.2 * metrics["q/error"][0]
    tilted = drawn(policy, Guide(state.trainable["network"], 8.0), count=2048)
    found = tiny.share_below_128(None, tilted.tokens, tilted.attend, tilted.mask)
    assert jnp.mean(found) > jnp.mean(scores) + 0.15


def test_the_target_is_the_average_of_the_networks_of_all_steps(tmp_path):
    config = dataclasses.replace(RUN, target_decay=0.75, num_steps=2)
    start = action_values.twin(tiny.model(), jax.random.key(0))
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        run(config, checkpoints=checkpoints)
    state, found = q_learning.init_state(config, {"network": start}), []
    for step in (2, 1):
        with Checkpoints(tmp_path, keep=10) as checkpoints:
            found.insert(0, jax.device_get(checkpoints.restore(state)[1]))
        shutil.rmtree(tmp_path / str(step))
    average = start.weights
    for one in found:
        now = one.trainable["network"].weights
        average = jax.tree.map(lambda a, x: 0.75 * a + 0.25 * x, average, now)
        for wanted, x in zip(*map(jax.tree.leaves, (average, one.average["network"].weights))):
            np.testing.assert_allclose(x, wanted, atol=1e-6)
    assert tiny.distance(found[0].average, state.average) > 1e-3


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("ilql", "2x2x2"), ("double_dqn", "1x2x4"), ("soft_q", "1x2x4")],
)
def test_a_run_is_the_same_on_eight_devices(name, mesh):
    # The heads start at 0, so the first gradients of the trunk are rounding, which Adam with its
    # usual eps would make into whole steps.
    slow = dataclasses.replace(tiny.ADAM, eps=1e-3)
    config, method = dataclasses.replace(RUN, optimizer=slow), METHODS[name]
    alone, split = (run(config, method=method, mesh=x) for x in ("1x1x1", mesh))
    for name in ("loss", "q/error", "grad_norm"):
        values = [line[name] for line in alone.history]
        np.testing.assert_allclose(
            [line[name] for line in split.history], values, rtol=1e-4, atol=1e-5
        )
    start = method.network(tiny.model(), jax.random.key(0))
    moved = tiny.distance(alone.network, start)
    assert moved > 0.01 and tiny.distance(split.network, alone.network) < 1e-3 * moved


def test_an_interrupted_run_ends_with_the_same_bits(trained, tmp_path):
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        run(checkpoints=checkpoints)
    for later in (3, 4):
        shutil.rmtree(tmp_path / str(later))
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        again = run(checkpoints=checkpoints)
    assert [line["step"] for line in again.history] == [2, 3]
    assert tiny.equal(again.network, trained.network)


def test_micro_batches_do_not_change_a_run(trained):
    split = run(dataclasses.replace(RUN, micro_batches=4))
    for line, wanted in zip(split.history, trained.history):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("method", [q_learning.ILQL, q_learning.SOFT_Q], ids=["ilql", "soft_q"])
def test_in_a_policy_with_an_adapter_only_the_adapter_and_the_heads_are_trained(method):
    policy = lora.attach(tiny.model(), lora.Config(rank=2), jax.random.key(5))
    result = run(policy=policy, method=method)
    base = policy.weights["layer_0"]["mlp"]["up"]
    found = result.network.weights["layer_0"]["mlp"]["up"]
    np.testing.assert_array_equal(found["kernel"], base["kernel"])
    assert not np.array_equal(found["lora_b"], base["lora_b"])
    assert np.any(np.asarray(result.network.weights["q"]["kernel"]) != 0)


# ----------------------------------------------------------------------------------- bad input


def test_a_target_network_of_another_shape_is_refused():
    network = action_values.single(tiny.model(), jax.random.key(0))
    wide = dataclasses.replace(tiny.SHAPE, d_model=16)
    other = transformer.init(wide, jax.random.key(0))
    target = action_values.single(other, jax.random.key(0))
    params = {"network": network, "target": target, "policy": tiny.model()}
    batch = jax.tree.map(jnp.asarray, answers().batch(0))
    for method in METHODS.values():
        with pytest.raises(ValueError, match="target network has other arrays"):
            method.loss(RUN, params, batch)


def test_a_guide_without_action_values_is_refused():
    with pytest.raises(ValueError, match=r"has a head q.* this model has \['head'\]"):
        drawn(tiny.model(), Guide(tiny.model(), 1.0))


def test_a_method_is_passed_and_not_named(no_shape_checks):
    with pytest.raises(ValueError, match="method='ILQL' is no Method"):
        q_learning.run(RUN, tiny.model(), answers(), method="ILQL")


def test_what_is_no_guide_and_values_of_another_vocabulary_are_refused():
    policy, network = guided()
    with pytest.raises(ValueError, match=r"takes decode.Guide\(network, weight\), not Model"):
        decode._check_guide(policy, network)
    shape = dataclasses.replace(tiny.SHAPE, vocab_size=300)
    other = action_values.single(transformer.init(shape, jax.random.key(0)), jax.random.key(0))
    with pytest.raises(ValueError, match="values of 300 tokens, but the policy has 264"):
        drawn(policy, Guide(other, 1.0))


def test_a_network_of_values_is_not_exported_over_what_is_there(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ValueError, match="no model that transformers has"):
        folders.export(tmp_path, guided()[1], tiny.TOKENIZER)
    assert (tmp_path / "kept").exists()


def test_settings_that_targets_of_paths_do_not_read_are_refused():
    config = dataclasses.replace(RUN, monte_carlo=0.5)
    with pytest.raises(ValueError, match="targets of paths are whole returns"):
        run(config, method=q_learning.SOFT_Q_PATHS)


def test_a_loader_of_another_kind_and_answers_without_scores_are_refused():
    with pytest.raises(ValueError, match=r"q_learning\.run"):
        run(data=tiny.demonstrations())
    rows = [
        {"prompt": "a", "responses": ["b", "c"], "scores": [1.0, 0.0]},
        {"prompt": "d", "responses": ["e", "f"], "ranks": [0, 1]},
    ]
    data = batches.Loader(batches.comparisons(rows, tiny.TOKENIZER, 4, 5), 8)
    with pytest.raises(ValueError, match="this loss reads scores"):
        run(data=data)


@pytest.mark.parametrize(
    ("field", "value"), [("expectile", 0.4), ("beta", 0.0), ("top_k", 0), ("target_decay", 1.5)]
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        q_learning.Config(**{field: value})
