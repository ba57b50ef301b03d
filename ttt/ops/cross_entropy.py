"""Next-token loss from hidden states, with no more logits in memory than a block's."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttt.core.batch import AnyArray
from ttt.core.precision import at_least_float32

Hidden = Float[Array, "T D"]
Table = Float[Array, "V D"]
Targets = Int[AnyArray, " T"]
PerToken = Float[Array, " T"]

# Tokens of a sequence whose logits are taken together, at most.
_TOKENS = 1024


def token_nll_naive(hidden: Hidden, table: Table, targets: Targets) -> PerToken:
    """−log p of each target in nats; logits in the dtype of `hidden`, log-softmax in float32."""
    logits = _logits(hidden, table)
    return jax.nn.logsumexp(logits, axis=-1) - _picked(logits, targets)


def token_nll(hidden: Hidden, table: Table, targets: Targets, *, block: int = 0) -> PerToken:
    """`token_nll_naive`, with the logits of at most `block` vocabulary entries in memory (0: all).

    table: one row per token, the embedding or the head transposed.
    In blocks the log-sum-exp is taken once, and the backward pass computes the logits again: one
    more product with the table, and nothing of size [T, V] in between. Differentiable again, in
    both modes.
    """
    if block == 0 or block >= table.shape[0]:
        return token_nll_naive(hidden, table, targets)
    return _in_blocks(_count_blocks(table.shape[0], block), hidden, table, jnp.asarray(targets))


def batch_nll(
    hidden: Float[Array, "B T D"], table: Table, targets: Int[AnyArray, "B T"], *, block: int = 0
) -> Float[Array, "B T"]:
    """`token_nll` of B sequences that share a table.

    As one row of tokens, so that the backward pass has one gradient of the table: under vmap a
    table in blocks would have one for every sequence.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    return token_nll(tokens, table, targets.reshape(-1), block=block).reshape(targets.shape)


def whole_nll(
    hidden: Float[Array, "B T D"], table: Table, targets: Int[AnyArray, "B T"], *, block: int = 0
) -> Float[Array, "B T"]:
    """`batch_nll` of long sequences, a thousand tokens or so of each at a time."""
    length = hidden.shape[1]
    count = -(-length // _TOKENS)
    size = -(-length // count)
    missing = count * size - length  # whole pieces, or an odd length would go token by token

    # Without blocks, the logits would be kept for the backward pass: [T, V] after all.
    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> Array:
        return batch_nll(part[0], table, part[1], block=block)

    def parts(x: AnyArray) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

    nll = jax.lax.map(one, (parts(hidden), parts(targets)))
    return jnp.moveaxis(nll, 0, 1).reshape(len(targets), -1)[:, :length]


def masked_mean(values: PerToken, mask: Bool[AnyArray, " T"]) -> Float[Array, ""]:
    """Mean over the positions where `mask` holds; 0 where it holds nowhere."""
    count = jnp.sum(mask).astype(values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(blocks: int, hidden: Hidden, table: Table, targets: Targets) -> PerToken:
    return _forward(blocks, hidden, table, targets)[0]


def _forward(blocks: int, hidden: Hidden, table: Table, targets: Targets) -> tuple[PerToken, tuple]:
    rows, starts = _blocks(table, blocks)
    wide = at_least_float32(hidden[:0]).dtype
    nothing = jnp.zeros(hidden.shape[0], wide)

    def add(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        highest, total, picked = carry
        logits, hit = _block_logits(hidden, *inputs, targets, table.shape[0])
        now = jax.lax.stop_gradient(jnp.maximum(highest, jnp.max(logits, axis=-1)))
        total = total * jnp.exp(highest - now) + jnp.sum(jnp.exp(logits - now[:, None]), axis=-1)
        return (now, total, picked + jnp.sum(jnp.where(hit, logits, 0), axis=-1)), None

    lowest = jnp.full_like(nothing, -jnp.inf)
    (highest, total, picked), _ = jax.lax.scan(add, (lowest, nothing, nothing), (rows, starts))
    lse = highest + jnp.log(total)
    return lse - picked, (hidden, table, targets, lse)


def _backward(blocks: int, residuals: tuple, d_nll: PerToken) -> tuple[Hidden, Table, None]:
    hidden, table, targets, lse = residuals
    rows, starts = _blocks(table, blocks)

    def add(d_hidden: Hidden, inputs: tuple) -> tuple[Hidden, Table]:
        logits, hit = _block_logits(hidden, *inputs, targets, table.shape[0])
        p = jnp.exp(logits - lse[:, None])
        d_logits = (d_nll[:, None] * (p - hit.astype(p.dtype))).astype(hidden.dtype)
        d_hidden = d_hidden + at_least_float32(d_logits @ inputs[0].astype(hidden.dtype))
        return d_hidden, (d_logits.T @ hidden).astype(table.dtype)

    d_hidden = jnp.zeros(hidden.shape, lse.dtype)
    d_hidden, d_rows = jax.lax.scan(add, d_hidden, (rows, starts))
    d_table = d_rows.reshape(-1, table.shape[-1])[: table.shape[0]]
    return d_hidden.astype(hidden.dtype), d_table, None


_in_blocks.defvjp(_forward, _backward)


def _logits(hidden: Hidden, table: Table) -> Float[Array, "T V"]:
    return at_least_float32(hidden @ table.astype(hidden.dtype).T)


def _picked(logits: Float[Array, "T V"], targets: Targets) -> PerToken:
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _block_logits(
    hidden: Hidden, rows: Table, start: Int[Array, ""], targets: Targets, vocabulary: int
) -> tuple[Float[Array, "T V"], Bool[Array, "T V"]]:
    """Logits of the rows from `start` (−inf for rows of padding), and which is each target's."""
    ids = start + jnp.arange(rows.shape[0], dtype=start.dtype)
    logits = jnp.where((ids < vocabulary)[None], _logits(hidden, rows), -jnp.inf)
    return logits, ids[None] == targets[:, None]


def _blocks(table: Table, blocks: int) -> tuple[Float[Array, "N B D"], Int[Array, " N"]]:
    size = -(-table.shape[0] // blocks)
    padded = jnp.pad(table, ((0, blocks * size - table.shape[0]), (0, 0)))
    return padded.reshape(blocks, size, -1), jnp.arange(blocks, dtype=jnp.int32) * size


def _count_blocks(vocabulary: int, block: int) -> int:
    """Blocks of at most `block` rows; a number that divides the vocabulary where one is near."""
    least = -(-vocabulary // block)
    even = (n for n in range(least, 2 * least) if vocabulary % n == 0)
    return next(even, least)
