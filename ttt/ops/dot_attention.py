"""Softmax attention of one sequence within a sliding window, or full, in blocks of queries.

Shapes, heads first: queries [H, T, K]; keys and values [G, P + T, K], of which P stand before the
first query (a cache, or padding). H is a multiple of G: query head a reads key head a // (H/G), as
in grouped-query attention (arXiv 2305.13245). Keys are never repeated: the H/G queries that share a
head of keys become rows of one product. Scores are scaled by 1/√K; softmax takes at least float32.

The backward pass recomputes the scores of a block from the log-sum-exp of the forward pass, so no
array has more than a block's scores. It is plain JAX, hence differentiable again, in both modes.
"""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ttt.core.batch import AnyArray
from ttt.core.precision import at_least_float32
from ttt.errors import UserError

_logger = logging.getLogger(__name__)

Queries = Float[Array, "H T K"]
Keys = Float[Array, "G S K"]
Statistic = Float[Array, "H T"]
Slot = Int[AnyArray, ""]


def choose(name: str, dtype: jnp.dtype) -> str:
    """The backend for whole sequences: `name`, or for `auto` the fastest that works here.

    Raises UserError for `cudnn` where it cannot serve.
    """
    if name not in ("auto", "cudnn"):
        return name
    works = dtype == jnp.bfloat16 and jax.default_backend() in ("gpu", "cuda") and _cudnn_works()
    if name == "cudnn" and not works:
        raise UserError(
            f"model.attention=cudnn on {jax.default_backend()} in {dtype}: cuDNN attention needs "
            "an NVIDIA GPU and model.compute_dtype=bf16. Choose auto, blocks or naive."
        )
    return "cudnn" if works else "blocks"


@cache
def _cudnn_works() -> bool:
    """Whether value and gradient of a small case compile: versions of cuDNN differ."""

    def loss(x: Queries) -> Float[Array, ""]:
        return jnp.sum(at_least_float32(jax.vmap(partial(attend_cudnn, window=64))(x, x, x)))

    try:
        x = jax.ShapeDtypeStruct((2, 2, 128, 64), jnp.bfloat16)
        jax.jit(jax.grad(loss)).lower(x).compile()
    except Exception as error:
        _logger.warning("cuDNN attention is not used, it does not compile here: %s", error)
        return False
    return True


def attend_cudnn(q: Queries, k: Queries, v: Queries, *, window: int | None) -> Queries:
    """Causal attention of a whole sequence by cuDNN; once differentiable, in reverse mode."""
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    span = None if window is None else (window - 1, 0)
    y = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=span, implementation="cudnn"
    )
    return jnp.swapaxes(y, 0, 1)


def attend_naive(q: Queries, k: Keys, v: Keys, mask: Bool[Array, "T S"]) -> Queries:
    """Attention where `mask` allows it, all pairs at once; every query must see a key."""
    scores = _scores("hqd,hkd->hqk", _grouped(q, k), k)
    mask = _repeated(mask, q, k)
    weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
    return _ungrouped(jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), v), q)


def window_mask(
    queries: int, past: int, window: int | None, first: Slot | int
) -> Bool[Array, "T S"]:
    """Which of `past` + `queries` keys each query sees: `window` of them (None: all) up to its own.

    Query i stands at key past + i. Keys before slot `first` do not exist.
    """
    keys = jnp.arange(past + queries, dtype=jnp.int32)[None, :]
    own = past + jnp.arange(queries, dtype=jnp.int32)[:, None]
    seen = (keys <= own) & (keys >= first)
    return seen if window is None else seen & (keys > own - window)


def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    first: Slot | int,
    window: int | None,
    block: int,
) -> Queries:
    """Attention of T queries to the keys up to their own, `block` queries at a time.

    With a window W there must be P = W keys before the first query; a block then meets the
    W + block keys that it can see, and nothing outside the band is computed. Without, a block
    meets all keys. `first` ≤ P is the first key slot that exists. T must be a multiple of `block`,
    or smaller.
    """
    block = min(block, q.shape[1])
    return _attend(window, block, q, k, v, jnp.asarray(first, jnp.int32))


def attend_growing(q: Queries, k: Keys, v: Keys, *, start: Slot, block: int) -> Queries:
    """Full attention of T queries at slots `start` … to the slots of a cache up to their own.

    k, v: the cache, the queries' own slots filled; `block` slots meet the queries at a time, and
    those behind the last query are not visited. Not differentiable in reverse mode.
    """
    queries, slots = q.shape[1], k.shape[1]
    own = jnp.tile(start + jnp.arange(queries, dtype=jnp.int32), len(q) // len(k))
    wide = at_least_float32(q[:0]).dtype
    like, q = q, _grouped(q, k)

    def add(i: Int[Array, ""], carry: tuple) -> tuple:
        highest, total, y = carry
        begin = jnp.minimum(i * block, slots - block)  # the last block may overlap its neighbour
        keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, block, axis=1) for x in (k, v))
        slot = begin + jnp.arange(block, dtype=jnp.int32)
        mask = (slot >= i * block)[None, :] & (slot[None, :] <= own[:, None])
        scores = jnp.where(mask[None], _scores("hqd,hkd->hqk", q, keys), -jnp.inf)
        now = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - now[..., None])
        shrink = jnp.exp(highest - now)
        total = total * shrink + jnp.sum(weights, axis=-1)
        part = jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), values)
        return now, total, y * shrink[..., None] + part.astype(wide)

    # Finite, since a query meets whole blocks behind it; every query sees slot 0.
    lowest = jnp.full(q.shape[:2], jnp.finfo(wide).min, wide)
    nothing = (lowest, jnp.zeros_like(lowest), jnp.zeros(q.shape, wide))
    blocks = (start + queries + block - 1) // block
    _, total, y = jax.lax.fori_loop(0, blocks, add, nothing)
    return _ungrouped((y / total[..., None]).astype(v.dtype), like)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window: int | None, block: int, q: Queries, k: Keys, v: Keys, first: Slot) -> Queries:
    return _attend_forward(window, block, q, k, v, first)[0]


def _attend_forward(
    window: int | None, block: int, q: Queries, k: Keys, v: Keys, first: Slot
) -> tuple[Queries, tuple]:
    past = k.shape[1] - q.shape[1]

    def one(start: Int[Array, ""], q: Queries) -> tuple[Queries, Statistic]:
        keys, values, mask = _visible(window, block, past, start, k, v, first)
        like, q = q, _grouped(q, keys)
        mask = _repeated(mask, like, keys)
        scores = jnp.where(mask[None], _scores("hqd,hkd->hqk", q, keys), -jnp.inf)
        highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - highest[..., None])
        total = jnp.sum(weights, axis=-1)
        y = jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), values)
        y = (at_least_float32(y) / total[..., None]).astype(v.dtype)
        return _ungrouped(y, like), (highest + jnp.log(total)).reshape(like.shape[:2])

    if block == q.shape[1]:
        y, lse = one(jnp.zeros((), jnp.int32), q)
    else:
        y, lse = jax.lax.map(lambda inputs: one(*inputs), (_starts(q, block), _blocks(q, block)))
        y, lse = _joined(y), _joined(lse)
    y, lse = checkpoint_name(y, "attention"), checkpoint_name(lse, "attention")
    return y, (q, k, v, first, y, lse)


def _attend_backward(
    window: int | None, block: int, residuals: tuple, d_y: Queries
) -> tuple[Queries, Keys, Keys, None]:
    q, k, v, first, y, lse = residuals
    past = k.shape[1] - q.shape[1]
    # Of softmax: ds = p·(dp − Σ p·dp), and Σ p·dp is y·dy.
    inner = jnp.sum(at_least_float32(y) * at_least_float32(d_y), axis=-1)

    def one(
        start: Int[Array, ""], q: Queries, d_y: Queries, lse: Statistic, inner: Statistic
    ) -> tuple[Queries, Keys, Keys]:
        """Keys lead in the scores here: three of the four products then run along memory."""
        keys, values, mask = _visible(window, block, past, start, k, v, first)
        mask, like = _repeated(mask, q, keys), q
        q, d_y = _grouped(q, keys), _grouped(d_y, keys)
        lse, inner = (x.reshape(len(keys), -1) for x in (lse, inner))
        scores = jnp.where(mask.T[None], _scores("hkd,hqd->hkq", keys, q), -jnp.inf)
        weights = jnp.exp(scores - lse[:, None, :])
        d_weights = jnp.einsum("hkd,hqd->hkq", values, d_y, preferred_element_type=lse.dtype)
        d_scores = weights * (d_weights - inner[:, None, :]) * q.shape[-1] ** -0.5
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        d_values = jnp.einsum("hkq,hqd->hkd", weights, d_y)
        d_keys = jnp.einsum("hkq,hqd->hkd", d_scores, q)
        d_q = jnp.einsum("hkq,hkd->hqd", d_scores, keys)
        return _ungrouped(d_q, like), d_keys, d_values

    if block == q.shape[1]:
        return (*one(jnp.zeros((), jnp.int32), q, d_y, lse, inner), None)

    inputs = (_starts(q, block), *(_blocks(x, block) for x in (q, d_y, lse, inner)))
    span = past + block if window is not None else k.shape[1]
    shift = block if window is not None else 0

    def back(later: tuple[Keys, Keys], inputs: tuple) -> tuple[tuple[Keys, Keys], tuple]:
        """Blocks from last to first. The newest keys of a block have got all they will get."""
        d_q, *here = one(*inputs)
        total = [a + b for a, b in zip(later, here, strict=True)]
        d_k, d_v = (jnp.pad(x, ((0, 0), (shift, 0), (0, 0)))[:, :span] for x in total)
        return (d_k, d_v), (d_q, *(x[:, span - shift :] for x in total))

    zeros = (jnp.zeros_like(k[:, :span]), jnp.zeros_like(v[:, :span]))
    later, (d_q, *finished) = jax.lax.scan(back, zeros, inputs, reverse=True)
    d_k, d_v = (
        # What is left over belongs to the keys before the first block.
        jnp.concatenate([x[:, shift:], _joined(done)], axis=1) if shift else x
        for x, done in zip(later, finished, strict=True)
    )
    return _joined(d_q), d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _grouped(q: Queries, k: Keys) -> Float[Array, "G RT K"]:
    """Queries as rows beside the keys that they share: R = H/G heads of T queries to each."""
    return q.reshape(len(k), -1, q.shape[-1])


def _ungrouped(y: Float[Array, "G RT K"], like: Queries) -> Queries:
    """The inverse of `_grouped`, for heads and tokens as `like` has them."""
    return y.reshape(*like.shape[:2], y.shape[-1])


def _repeated(mask: Bool[Array, "T S"], q: Queries, k: Keys) -> Bool[Array, "RT S"]:
    """The mask of queries, for the rows of `_grouped`."""
    return jnp.tile(mask, (len(q) // len(k), 1))


def _scores(
    subscripts: str, a: Float[Array, "G A K"], b: Float[Array, "G B K"]
) -> Float[Array, "G A B"]:
    wide = at_least_float32(a[:0]).dtype
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide) * a.shape[-1] ** -0.5


def _visible(
    window: int | None,
    block: int,
    past: int,
    start: Int[Array, ""],
    k: Keys,
    v: Keys,
    first: Slot,
) -> tuple[Float[Array, "G B K"], Float[Array, "G B K"], Bool[Array, "block B"]]:
    """Keys and values that the block of queries from `start` meets, and the mask between them."""
    if window is None:
        mask = window_mask(k.shape[1] - past, past, None, first)
        return k, v, jax.lax.dynamic_slice_in_dim(mask, start, block)
    mask = window_mask(block, window, window, first - start)
    if window + block == k.shape[1]:
        return k, v, mask
    keys, values = (jax.lax.dynamic_slice_in_dim(x, start, window + block, axis=1) for x in (k, v))
    return keys, values, mask


def _starts(q: Queries, block: int) -> Int[Array, " N"]:
    return jnp.arange(0, q.shape[1], block, dtype=jnp.int32)


def _blocks(x: Float[Array, "H T *rest"], block: int) -> Float[Array, "N H B *rest"]:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _joined(x: Float[Array, "N H B *rest"]) -> Float[Array, "H T *rest"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
