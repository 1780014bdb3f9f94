"""Every implementation of attention against the plain one, and what each leaves in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention, blockwise

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

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, arrays, change):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(change)

    want, want_gradients = both(plain, arrays, change)
    got, gradients = both(other, arrays, change)
    assert jnp.all(jnp.isfinite(got))
    real = np.broadcast_to((documents > 0)[:, None], got.shape[:3])
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
    for g, w in zip(gradients, want_gradients):
        np.testing.assert_allclose(g, w, atol=2e-5)
