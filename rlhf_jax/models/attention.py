"""The one function through which all attention goes, and the kernels that it chooses from.

`plain` holds the whole [T, S] matrix of each head; it is short, and the others are tested against
it. The others never hold it: `blockwise` in jax, splash attention on TPUs and cuDNN on GPUs.
`attend_to_cache` is that of decoding.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import shards
from rlhf_jax.models import blockwise, layers

# Rows at least this long are not attended to by `plain`, by the platform of the devices.
LONG = {"cpu": 128, "gpu": 256, "tpu": 128}
BLOCKS = {"cpu": 128}  # tokens of a block of `blockwise`; elsewhere OTHER_BLOCK
OTHER_BLOCK = 512
LANES = 128  # splash attention reads whole multiples of this many tokens
SPLASH_BLOCK = 512  # tokens of one of its blocks, at most


class Visible(NamedTuple):
    """Which columns of a key-value cache the token that is being read may attend to."""

    shared: Bool[Array, "B P"] | None  # None where rows share nothing
    own: Bool[Array, "#M R"]  # one row, where all rows see the same columns


class AttentionInputs(NamedTuple):
    """What attention needs besides the hidden states; computed once for many layers."""

    rotary: tuple[Array, Array] | None  # cosines and sines of `rope.cos_sin`; None: no rotation
    # Whole rows: number of the document in each column, 0 on padding. What a token may attend to
    # follows from it and from the layer's window.
    documents: Int[Array, "B T"] | None
    visible: Visible | None = None  # one token per row, which attends to a cache


def attend(
    query: Float[Array, "B H T Dh"],
    keys: Float[Array, "B K T Dh"],
    values: Float[Array, "B K T Dh"],
    documents: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B H T Dh"]:
    """Each query's mean of the values, weighted by the softmax of its products with the keys.

    H / K consecutive query heads share a key and value head. The products are multiplied by
    `scale`; `softcap` c turns them into c * tanh(logits / c). Each token attends to itself and to
    the earlier ones of its document, of `window` tokens in all; padding attends to padding, which
    is finite and means nothing. The softmax is float32.

    The implementation follows from the platform of the mesh's devices, the length and what else is
    asked for (`choose`). On several devices each attends to its own rows and heads.
    """
    platform, length = shards.platform(), query.shape[2]
    name = choose(platform, length, query.shape[3], query.dtype.name, softcap)
    if name == "plain":
        steps = jnp.arange(length)
        mask = blockwise.visible(documents, documents, steps, steps, window)
        return plain(query, keys, values, mask, scale=scale, softcap=softcap)
    arguments = {"scale": scale, "softcap": softcap, "window": window}
    if name == "blockwise":
        arguments["block"] = BLOCKS.get(platform, OTHER_BLOCK)
    if name == "cudnn":
        del arguments["softcap"]  # None: see `choose`
    kernel = {"blockwise": blockwise.attend, "splash": splash, "cudnn": cudnn}[name]
    kernel = functools.partial(kernel, **arguments)
    return shards.per_shard(kernel, query, keys, values, documents)


def choose(platform: str, length: int, head_dim: int, dtype: str, softcap: float | None) -> str:
    """Name of the implementation for whole rows of `length` tokens.

    Where a GPU's cuDNN cannot do what is asked for, that is said once.
    """
    if length < LONG.get(platform, LONG["gpu"]):
        return "plain"
    if platform == "tpu":
        return "splash"
    if platform != "gpu":
        return "blockwise"
    lacks = [
        (dtype == "float32", "has no float32"),
        (softcap is not None, "has no soft cap"),
        (head_dim % 8 or head_dim > 128, f"has no heads of width {head_dim}"),
    ]
    reasons = [reason for found, reason in lacks if found]
    if not reasons:
        return "cudnn"
    _say_once(f"attention is computed blockwise in jax, because cuDNN {' and '.join(reasons)}")
    return "blockwise"


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def plain(
    query: Float[Array, "B H T Dh"],
    keys: Float[Array, "B K S Dh"],
    values: Float[Array, "B K S Dh"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B H T Dh"]:
    """`attend` with the whole matrix of weights, to the keys where `mask` is true."""
    batch, heads, length, width = query.shape
    kv_heads, size = keys.shape[1:3]
    query = query.reshape(batch, kv_heads, -1, width)  # [B, K, G * T, Dh]
    weights = layers.einsum("bkqd,bksd->bkqs", query, keys, preferred_element_type=jnp.float32)
    weights = weights * scale
    if softcap is not None:
        weights = softcap * jnp.tanh(weights / softcap)
    weights = weights.reshape(batch, kv_heads, -1, length, size)
    weights = jnp.where(mask[:, None, None], weights, blockwise.HIDDEN)
    weights = jax.nn.softmax(weights, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, -1, size)
    mixed = layers.einsum("bkqs,bksd->bkqd", weights, values)
    return mixed.reshape(batch, heads, length, width)


def attend_to_cache(
    query: Float[Array, "M H 1 Dh"],
    shared: tuple[Float[Array, "B K P Dh"], Float[Array, "B K P Dh"]] | None,
    own: tuple[Float[Array, "M K R Dh"], Float[Array, "M K R Dh"]],
    visible: Visible,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "M H 1 Dh"]:
    """`attend` for one new token per row, to what the row shares with others and to its own.

    M = B * N: N consecutive rows share keys and values, which are held, and read, once. `shared`
    and `own` are keys and values.
    """
    if shared is None:
        return plain(query, *own, visible.own[:, None], scale=scale, softcap=softcap)
    rows, heads, _, width = query.shape
    batch, kv_heads, size, _ = shared[0].shape

    def by_prompt(x):
        """[M, K, G, n] -> [B, K, N * G, n]"""
        x = x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    def by_row(x):
        """[B, K, N * G, n] -> [M, K, G, n]"""
        x = x.reshape(batch, kv_heads, rows // batch, -1, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(rows, kv_heads, -1, x.shape[-1])

    def products(query, keys):
        return layers.einsum("bkqd,bksd->bkqs", query, keys, preferred_element_type=jnp.float32)

    def mixed(weights, values):
        return layers.einsum("bkqs,bksd->bkqd", weights, values, preferred_element_type=jnp.float32)

    query = query.reshape(rows, kv_heads, -1, width)
    logits = [by_row(products(by_prompt(query), shared[0])), products(query, own[0])]
    logits = jnp.concatenate(logits, axis=-1) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    seen = jnp.repeat(visible.shared, rows // batch, axis=0)
    own_seen = jnp.broadcast_to(visible.own, (rows, visible.own.shape[1]))
    seen = jnp.concatenate([seen, own_seen], axis=1)
    logits = jnp.where(seen[:, None, None], logits, blockwise.HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    out = by_row(mixed(by_prompt(weights[..., :size]), shared[1]))
    out = out + mixed(weights[..., size:], own[1])
    return out.astype(query.dtype).reshape(rows, heads, 1, width)


def splash(
    query: Float[Array, "B H T Dh"],
    keys: Float[Array, "B K T Dh"],
    values: Float[Array, "B K T Dh"],
    documents: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B H T Dh"]:
    """`attend` by jax's splash attention, a kernel for TPUs; `interpret` runs it elsewhere, slowly.

    Rows are padded to a multiple of 128 tokens.
    """
    # Imported here, because importing the kernels takes as long as a small test.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, dtype = query.shape[2], query.dtype
    pad = ((0, 0), (0, 0), (0, -length % LANES), (0, 0))
    query, keys, values = (jnp.pad(x, pad) for x in (query * scale, keys, values))
    documents = jnp.pad(documents, pad[1:3])
    size = query.shape[2]
    block = next(b for b in (SPLASH_BLOCK, SPLASH_BLOCK // 2, LANES) if size % b == 0 or b == LANES)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = (
        masks.CausalMask((size, size))
        if window is None
        else masks.LocalMask((size, size), (window - 1, 0), 0)
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel's products follow jax's default, which rounds float32 to bfloat16.
    exact = dtype == jnp.float32
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        segments = kernels.SegmentIds(documents, documents)
        return jax.vmap(kernel)(query, keys, values, segments)[:, :, :length].astype(dtype)


def cudnn(
    query: Float[Array, "B H T Dh"],
    keys: Float[Array, "B K T Dh"],
    values: Float[Array, "B K T Dh"],
    documents: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B H T Dh"]:
    """`attend` by cuDNN, a kernel for GPUs; it has no soft cap, and no float32.

    The kernel takes one document a row that begins in column 0, so rows are rolled there and back.
    Batches in which a row holds several documents are attended to blockwise.
    `implementation` is that of `jax.nn.dot_product_attention`; "xla" runs everywhere.
    """
    length = query.shape[2]
    real = documents > 0
    first = jnp.argmax(real, axis=1)
    count = jnp.sum(real, axis=1)
    last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
    alone = (documents == jnp.max(documents, axis=1, keepdims=True)) | ~real
    one_document = jnp.all(alone) & jnp.all((count == last - first + 1) | (count == 0))

    def rolled(x, by):
        columns = (jnp.arange(length) + by[:, None]) % length
        return jnp.take_along_axis(x, columns[:, :, None, None], axis=1)

    def by_cudnn(*arrays):
        # At least 1: a row that is all padding reads itself.
        lengths = jnp.maximum(count, 1).astype(jnp.int32)
        out = jax.nn.dot_product_attention(
            *(rolled(x.swapaxes(1, 2), first) for x in arrays),
            scale=scale,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )
        out = jnp.where((jnp.arange(length) < lengths[:, None])[..., None, None], out, 0)
        return rolled(out, -first).swapaxes(1, 2)

    def by_blocks(*arrays):
        return blockwise.attend(*arrays, documents, scale=scale, window=window, block=OTHER_BLOCK)

    return jax.lax.cond(one_document, by_cudnn, by_blocks, query, keys, values)
