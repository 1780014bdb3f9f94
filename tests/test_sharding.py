"""Where arrays live: the rules against every parameter, and one gradient on five meshes."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax import losses, sharding, shards
from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.data.batches import Comparisons, Demonstrations
from rlhf_jax.models import attention, heads, lora, stacking, transformer
from rlhf_jax.training import state

CONFIG = transformer.Config(
    vocab_size=32,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    max_length=8,
)
OPTIMIZER = state.OptimizerConfig()


def init(key, tied=False):
    return transformer.init(dataclasses.replace(CONFIG, tied=tied), key)


def make_scorer(key):
    return heads.init_scorer(init(key), key)


def init_train_state(key):
    models = {"policy": init(key), "critic": transformer.with_score_head(init(key, True), key)}
    return state.init_state(state.make_optimizer(OPTIMIZER, 10), models)


def make_other(key):
    options = {"norm": "layer", "positions": "learned", "qk_norm": True}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    return transformer.init(dataclasses.replace(CONFIG, **options, **biases), key)


def make_adapted(key):
    return lora.attach(init(key), lora.Config(), key)


def make_online(key):
    """What an online algorithm carries besides networks, and a reward that is no model."""
    rewards, bias = jax.random.normal(key, (7,)), jax.random.normal(key, (3,))
    return {"memory": {"rewards": rewards}, "scorer": {"bias": bias}}


KINDS = {
    "online": make_online,
    "adapted": make_adapted,
    "untied": init,
    "tied": functools.partial(init, tied=True),
    "every option": make_other,
    "scorer": make_scorer,
    "train state": init_train_state,
}


@pytest.fixture(scope="module")
def shapes():
    key = jax.random.key(0)
    return {name: jax.eval_shape(make, key) for name, make in KINDS.items()}


def leaves(tree):
    return {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


# --- rules --------------------------------------------------------------------------------------


def test_every_parameter_and_every_optimizer_moment_has_one_rule(shapes):
    for kind, tree in shapes.items():
        for name, leaf in leaves(tree).items():
            matches = [pattern for pattern, _ in sharding.RULES if re.search(pattern, name)]
            assert len(matches) == (1 if leaf.ndim else 0), (kind, name, matches)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for tree in shapes.values():
        assert jax.tree.structure(sharding.tree(mesh, tree)) == jax.tree.structure(tree)


def test_every_rule_has_a_parameter(shapes):
    names = [name for tree in shapes.values() for name in leaves(tree)]
    for pattern, _ in sharding.RULES:
        assert any(re.search(pattern, name) for name in names), pattern


def test_optimizer_moments_live_where_their_parameter_does(shapes):
    train_state = shapes["train state"]
    where = leaves(sharding.tree(sharding.make_mesh(), train_state))
    parameters = {n.removeprefix("trainable/"): s for n, s in where.items() if "trainable/" in n}
    for moment in ("mu/", "nu/"):
        found = {n.split(moment)[1]: s for n, s in where.items() if moment in n}
        assert found == parameters


@pytest.mark.parametrize(
    "name",
    [
        "weights/layer_0/attention/qeury/kernel",
        "weights/layer_0/attention/query/kernels",
        "weights/layer_0/attention/query/biases",
        "weights/layer_0/mlp_nrom/scale",
        "weights/embedding",
        "weights/anything",
    ],
)
def test_a_name_without_a_rule_raises_and_is_not_silently_replicated(name):
    with pytest.raises(ValueError, match=f"no rule in sharding.RULES matches {name} "):
        sharding.spec_for(sharding.make_mesh(), name, (8, 8))


def test_an_axis_that_does_not_divide_its_dimension_is_left_out():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)

    def query(*shape):
        return sharding.spec_for(mesh, "query/kernel", shape)

    assert query(8, 8) == P("fsdp", "tensor")
    assert query(6, 8) == P(None, "tensor")
    assert query(8, 7) == P("fsdp", None)
    assert query(6, 7) == P(None, None)
    assert sharding.spec_for(mesh, "any/name", ()) == P()  # step counts


# --- meshes -------------------------------------------------------------------------------------


def test_fsdp_takes_the_devices_that_the_other_axes_leave():
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    small = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    assert small.devices.size == 2


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "mesh data=3,tensor=1 does not divide the 8 devices"),
        (dict(data=2, tensor=8), "mesh data=2,tensor=8 does not divide the 8 devices"),
        (dict(data=4, fsdp=4), "mesh data=4,fsdp=4,tensor=1 needs 16 devices, but there are 8"),
        (dict(data=0), "mesh data=0,fsdp=None,tensor=1: sizes must be at least 1"),
        (dict(fsdp=0), "fsdp=0,tensor=1: sizes must be at least 1"),
        (dict(tensor=-1), "tensor=-1: sizes must be at least 1"),
    ],
    ids=str,
)
def test_a_mesh_that_the_devices_cannot_make_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_rows_must_divide_over_data_and_fsdp_together():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.row_shards(mesh) == 4
    sharding.check_rows(mesh, batch_size=8, minibatch_size=4)
    with pytest.raises(ValueError, match=r"minibatch_size=6 .* data x fsdp = 4 .* multiple of 4"):
        sharding.check_rows(mesh, batch_size=8, minibatch_size=6)


# --- arrays -------------------------------------------------------------------------------------


def test_arrays_are_initialised_sharded_and_no_device_holds_a_whole_one():
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    state = sharding.initialise(mesh, init_train_state, jax.random.key(0))
    for name, leaf in leaves(state).items():
        assert len(leaf.addressable_shards) == 8
        whole = leaf.ndim < 2  # norms, biases and counts are replicated
        for shard in leaf.addressable_shards:
            assert shard.data.size * (1 if whole else 8) == leaf.size, name
    plain = jax.jit(init_train_state)(jax.random.key(0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, plain)


def test_initialising_with_another_key_compiles_nothing_but_another_shape_does():
    mesh, traced = sharding.make_mesh(), []

    def make(shape, key):
        traced.append(shape.d_ff)
        return transformer.init(shape, key)

    for seed, d_ff in ((1, 24), (2, 24), (2, 32), (3, 24)):
        shape = dataclasses.replace(CONFIG, d_ff=d_ff)
        sharding.initialise(mesh, make, shape, jax.random.key(seed), static_argnums=0)
    assert traced == [24, 32]


def test_placing_moves_parameters_to_their_shards_and_keeps_their_values(shapes):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("float32"), shapes["scorer"])
    placed = sharding.place(mesh, tree)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    where = sharding.tree(mesh, tree)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, placed, where))


def test_rows_are_split_and_constraints_do_nothing_without_a_mesh():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = np.arange(16).reshape(8, 2)
    put = sharding.put_rows(mesh, batch)
    np.testing.assert_array_equal(put, batch)
    assert {shard.data.shape for shard in put.addressable_shards} == {(2, 2)}
    assert sharding.replicated(mesh).is_fully_replicated
    x = jnp.ones((8, 2, 3))
    assert shards.constrain_rows(x) is x and shards.constrain_heads(x) is x
    with jax.set_mesh(mesh):
        heads = jax.jit(shards.constrain_heads)(put[:, :, None])
        odd = jax.jit(shards.constrain_heads)(jnp.ones((8, 3, 1)))
    assert {shard.data.shape for shard in heads.addressable_shards} == {(2, 1, 1)}
    assert {shard.data.shape for shard in odd.addressable_shards} == {(2, 3, 1)}


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_a_lookup_outside_of_the_table_is_nan_and_no_other_row(sizes, decoding):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(16, 8)).astype(np.float32)
    ids = rng.integers(0, 16, (8, 5))
    ids[0], ids[5, 2] = [-17, -1, 16, 31, 0], 1000
    want = jnp.take(table, jnp.where(ids < 0, 99, ids), axis=0, mode="fill")  # it would wrap -1
    assert np.isnan(want).all(axis=-1).sum() == 5

    def loss(table):
        found = shards.lookup(table, ids, jnp.float32, decoding=decoding)
        return jnp.sum(jnp.where(jnp.isnan(found), 0, found) ** 2), found

    mesh = sharding.make_mesh(*(sizes or (1, 1, 1)))
    with contextlib.nullcontext() if sizes is None else jax.set_mesh(mesh):
        gradient, found = jax.jit(jax.grad(loss, has_aux=True))(table)
    np.testing.assert_array_equal(found, want)
    expected = np.zeros_like(table)
    np.add.at(expected, ids[(ids >= 0) & (ids < 16)], 2 * want[(ids >= 0) & (ids < 16)])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


# --- one gradient on every mesh -----------------------------------------------------------------

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def batches():
    """Uneven on purpose: devices see different numbers of tokens, of pairs, and none of either."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 8)).astype(np.int32)
    lengths = np.array([8, 8, 7, 6, 5, 3, 2, 1])
    attend = (np.arange(8) < lengths[:, None]).astype(np.int32)
    mask = (attend * (np.arange(8) >= 2)).astype(np.float32)
    ranks = np.array([[0, 1], [1, 0], [0, 0], [0, 1], [0, 1], [1, 0], [0, 1], [0, 1]], np.int32)
    present = np.ones((8, 2), np.float32)
    present[4, 1] = 0.0
    return Demonstrations(tokens, attend, mask), Comparisons(
        tokens=rng.integers(0, CONFIG.vocab_size, (8, 2, 8)).astype(np.int32),
        attend=np.stack([attend, attend[::-1]], axis=1) * present[..., None].astype(np.int32),
        mask=np.stack([mask, mask[::-1]], axis=1) * present[..., None],
        ranks=ranks,
        present=present,
        margin=np.linspace(0.0, 1.0, 8, dtype=np.float32),
    )


def gradients(models, demonstrations, comparisons):
    """Loss and norm of every tensor's gradient, for SFT and for the reward model."""

    def one(loss, config, params, batch):
        (value, _), grads = jax.value_and_grad(loss, argnums=1, has_aux=True)(config, params, batch)
        return value, jax.tree.map(jnp.linalg.norm, stacking.unstack_all(grads))

    return (
        one(sft.loss, sft.Config(), {"policy": models["policy"]}, demonstrations),
        one(
            reward_model.loss,
            reward_model.Config(centring_coef=0.01),
            {"scorer": models["scorer"]},
            comparisons,
        ),
    )


def on_mesh(sizes, models):
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        batch = sharding.put_rows(mesh, batches())
        return leaves(jax.jit(gradients)(sharding.place(mesh, models), *batch))


@pytest.fixture(scope="module")
def models(shapes):
    rng = np.random.default_rng(1)
    pair = {"policy": shapes["untied"], "scorer": shapes["scorer"]}
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype("float32"), pair)


@pytest.fixture(scope="module")
def one_device(models):
    return on_mesh((1, 1, 1), models)


def check_same(got, one_device):
    assert got.keys() == one_device.keys()
    for name, want in one_device.items():
        assert want > 0, name
        np.testing.assert_allclose(got[name], want, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_and_gradients_are_those_of_one_device(sizes, models, one_device):
    check_same(on_mesh(sizes, models), one_device)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_they_are_with_layers_in_a_loop_and_attention_in_blocks(
    sizes, models, one_device, monkeypatch
):
    monkeypatch.setitem(attention.LONG, "cpu", 1)
    monkeypatch.setitem(attention.BLOCKS, "cpu", 4)
    variants = {
        name: stacking.stack(
            dataclasses.replace(x, config=dataclasses.replace(x.config, remat="full"))
        )
        for name, x in models.items()
    }
    assert "layers" in variants["policy"].weights
    check_same(on_mesh(sizes, variants), one_device)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (1, 2, 4)], ids=str)
def test_the_gradient_of_a_bfloat16_head_does_not_depend_on_the_number_of_chunks(sizes):
    """Each chunk adds to it, in float32; sums of 64 bfloat16 numbers would be off by a percent."""
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.normal(size=(8, 64, 16)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 32, (8, 64)))

    def gradient(chunk_bytes):
        def loss(head):
            chunked = functools.partial(losses.chunked_token_logprobs, chunk_bytes=chunk_bytes)
            return jnp.sum(shards.over_vocabulary(chunked, hidden, head, tokens)[0])

        with jax.set_mesh(sharding.make_mesh(*sizes)):
            return jax.jit(jax.grad(loss))(head)

    one, many = gradient(2**30), gradient(1)  # all positions at once, and one by one
    assert jnp.linalg.norm(one - many) < 4e-3 * jnp.linalg.norm(one)
