"""Every implementation of attention against the plain one, and what each leaves in memory."""

import dataclasses
import functools
import importlib.util
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import cost, hlo, plan, sharding, shards
from rlhf_jax.models import attention, blockwise, transformer

B, T, WIDTH = 4, 200, 16
KERNELS = {
    "blockwise": functools.partial(blockwise.attend, block=64),
    "one block": functools.partial(blockwise.attend, block=256),
    "splash": functools.partial(attention.splash, interpret=True),
    "cudnn": functools.partial(attention.cudnn, implementation="xla"),
}


def rows(length=T):
    """Padding on the right, on the left and on both sides, and padding alone."""
    documents = np.ones((B, length), np.int32)
    documents[0, -50:] = 0
    documents[1, :70] = 0
    documents[2, :20] = documents[2, -30:] = 0
    documents[3] = 0
    return documents


def packed(length=T):
    """Rows of several documents, which end within blocks and at their edges."""
    documents = np.zeros((B, length), np.int32)
    for row, ends in enumerate([(64, 128, 200), (1, 3, 190), (30, 150), (200,)]):
        for number, (start, end) in enumerate(zip((0, *ends), ends), start=1):
            documents[row, start:end] = number
    return documents


def mask_of(documents, window):
    """The rule in words, entry by entry: same document, not later, within the window."""
    length = documents.shape[1]
    mask = np.zeros((len(documents), length, length), bool)
    for t in range(length):
        for s in range(max(0, t + 1 - (window or length)), t + 1):
            mask[:, t, s] = documents[:, t] == documents[:, s]
    return mask


def draw(heads, kv_heads, length=T, dtype=jnp.float32, width=WIDTH):
    """Query, keys, values, and a gradient of the result."""
    rng = np.random.default_rng(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [jnp.asarray(rng.normal(size=(B, n, length, width)), dtype) for n in sizes]


CASES = {
    "padding": (rows, 2, 2, {}),
    "padding, grouped": (rows, 4, 2, {}),
    "padding, window": (rows, 2, 1, {"window": 33}),
    "padding, soft cap": (rows, 2, 2, {"softcap": 1.5}),
    "packed": (packed, 4, 2, {}),
    "packed, window, soft cap": (packed, 4, 1, {"window": 70, "softcap": 1.5}),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_every_implementation_is_the_plain_one_in_value_and_gradient(kernel, case):
    make, heads, kv_heads, options = CASES[case]
    if kernel == "cudnn" and "softcap" in options:
        pytest.skip("cuDNN has no soft cap")
    documents = make()
    *arrays, change = draw(heads, kv_heads)
    # What padding gets is nobody's business, as long as it is finite.
    change = change * (documents > 0)[:, None, :, None]
    mask = jnp.asarray(mask_of(documents, options.get("window")))

    def plain(*arrays):
        return attention.plain(*arrays, mask, scale=0.3, softcap=options.get("softcap"))

    def other(*arrays):
        return KERNELS[kernel](*arrays, jnp.asarray(documents), scale=0.3, **options)

    want, want_gradients = value_and_gradients(plain, arrays, change)
    got, gradients = value_and_gradients(other, arrays, change)
    assert jnp.all(jnp.isfinite(got))
    real = np.broadcast_to((documents > 0)[:, None], got.shape[:3])
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
    for g, w in zip(gradients, want_gradients):
        np.testing.assert_allclose(g, w, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, arrays, change):
    out, pull = jax.vjp(function, *arrays)
    return out, pull(change)


def test_in_bfloat16_blocks_round_as_the_whole_matrix_does():
    documents = jnp.asarray(packed())
    mask = jnp.asarray(mask_of(packed(), None))
    *arrays, change = draw(4, 2)
    exact, exact_gradients = value_and_gradients(
        lambda *x: attention.plain(*x, mask, scale=0.3), arrays, change
    )
    *arrays, change = draw(4, 2, dtype=jnp.bfloat16)
    got, gradients = value_and_gradients(
        lambda *x: blockwise.attend(*x, documents, scale=0.3, block=64), arrays, change
    )
    want, want_gradients = value_and_gradients(
        lambda *x: attention.plain(*x, mask, scale=0.3), arrays, change
    )

    def error(found, truth):
        return float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth))

    for found, whole, truth in zip(
        (got, *gradients), (want, *want_gradients), (exact, *exact_gradients)
    ):
        assert found.dtype == jnp.bfloat16
        assert error(found, truth) < 1.2 * error(whole, truth) < 0.02


def test_keys_that_no_query_of_a_group_sees_are_not_visited():
    """Seven blocks of four queries, in groups of two: first and last column of queries and keys."""
    groups = blockwise._groups(28, blockwise.Form(1.0, None, None, 4))
    assert [(q.start, q.stop, k.start, k.stop) for q, k, _ in groups] == [
        (0, 8, 0, 8),
        (8, 16, 0, 16),
        (16, 24, 0, 24),
        (24, 28, 0, 28),
    ]


def sizes(lowered):
    """The numbers of elements of all arrays of a program."""
    found = re.findall(r"tensor<((?:\d+x)+[a-z]\w*)>", lowered.as_text())
    return [np.prod([int(n) for n in shape.split("x")[:-1]]) for shape in found]


def flops_and_largest_array(length, window):
    """Of a forward and backward pass over one row of one head."""
    shape = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
    documents = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(*arrays):
        return blockwise.attend(*arrays, scale=0.3, window=window, block=32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*[shape] * 3, documents)
    return cost.of(hlo.read(lowered.compile().as_text())).flops, max(sizes(lowered))


def test_a_window_costs_its_own_keys_however_long_the_row_is():
    work, arrays = zip(*(flops_and_largest_array(length, 40) for length in (512, 1024)))
    assert work[1] == pytest.approx(2 * work[0], rel=0.02)
    assert arrays[1] == 1024 * 8  # the row itself: the weights of a block are 32 * (40 + 31)
    everything = flops_and_largest_array(1024, None)[0]
    assert work[1] < 0.2 * everything


@pytest.mark.parametrize("mesh", ["2x2x2", "1x2x4"])
def test_on_several_devices_each_attends_to_its_own_rows_and_heads(mesh):
    """With four devices along tensor, the two heads of keys are repeated for two devices each."""
    documents = jnp.asarray(packed())
    *arrays, change = draw(4, 2)
    kernel = functools.partial(blockwise.attend, scale=0.3, block=64)
    want, want_gradients = value_and_gradients(lambda *x: kernel(*x, documents), arrays, change)

    def split(*arrays):
        return shards.per_shard(kernel, *map(shards.constrain_heads, arrays), documents)

    with jax.set_mesh(tiny.mesh(mesh)):
        got, gradients = value_and_gradients(split, arrays, change)
    np.testing.assert_allclose(got, want, atol=1e-6)
    for g, w in zip(gradients, want_gradients):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_the_implementation_follows_from_platform_length_and_case(caplog):
    def chosen(platform, length=1024, head_dim=64, dtype="bfloat16", softcap=None):
        return attention.choose(platform, length, head_dim, dtype, softcap)

    assert {chosen(platform, length=32) for platform in ("cpu", "gpu", "tpu")} == {"plain"}
    assert chosen("cpu") == "blockwise"
    assert chosen("tpu") == chosen("tpu", dtype="float32", softcap=50.0) == "splash"
    assert chosen("gpu") == "cudnn" and not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert chosen("gpu", dtype="float32") == "blockwise"
            assert chosen("gpu", head_dim=20, softcap=50.0) == "blockwise"
    assert [record.getMessage() for record in caplog.records] == [
        "attention is computed blockwise in jax, because cuDNN has no float32",
        "attention is computed blockwise in jax, because cuDNN has no soft cap and has no heads of "
        "width 20",
    ]


SHAPE = transformer.Config(
    vocab_size=64,
    num_layers=2,
    d_model=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=128,
    max_length=8192,
    window=1024,
    full_layers=(1,),
    attention_softcap=50.0,
)


def training_step(shape, mesh, rows, length):
    """The lowered gradient of a sum of hidden states; nothing is computed."""
    model = jax.eval_shape(functools.partial(transformer.init, shape), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(model, tokens, attend):
        return jnp.sum(transformer.hidden_states(model, tokens, attend).astype(jnp.float32))

    shardings = (sharding.tree(mesh, model), sharding.rows(mesh), sharding.rows(mesh))
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss), in_shardings=shardings).trace(model, tokens, tokens)
        return traced.lower(lowering_platforms=(shards.platform(),))


def test_training_holds_no_array_of_queries_times_keys():
    """The largest array, a block of queries times keys, grows with the length, not its square."""
    length = 8192
    lowered = {n: training_step(SHAPE, tiny.mesh(), 1, n) for n in (length // 2, length)}
    half, lowered = lowered.values()
    assert length * 128 in sizes(lowered)  # the hidden states: the search finds arrays
    assert max(sizes(lowered)) == SHAPE.num_heads * attention.BLOCKS["cpu"] * length
    assert max(sizes(lowered)) == 2 * max(sizes(half))
    # All temporaries together are smaller than the weights of one head of one layer would be.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * length * length


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]")
def test_a_transformer_compiles_with_splash_attention_for_a_tpu_slice():
    """Windows, soft caps and grouped queries, forward and backward, split over rows and heads."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=plan.topology("v5e:2x2"))
    lowered = training_step(dataclasses.replace(SHAPE, dtype="bfloat16"), mesh, 2, 500)
    text = lowered.compile({"exec_time_optimization_effort": -1.0}).as_text()
    assert all(f"splash_mha_{part}" in text for part in ("fwd", "dq", "dkv"))
