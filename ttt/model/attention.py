"""Softmax attention as a mixer: full, or within a sliding window."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ttt.model.layers import Linear, RMSNorm
from ttt.model.mixer import AbstractMixer
from ttt.ops.dot_attention import (
    attend,
    attend_cudnn,
    attend_growing,
    attend_naive,
    choose,
    window_mask,
)
from ttt.ops.rotary import rotate

# Keys whose scores with a piece of queries are in memory together, under full attention.
_KEY_BLOCK = 512


class KeyValueCache(NamedTuple):
    """Keys (after QK-norm) and values of what has been read.

    With a window W, of the last W positions, newest last, keys not rotated: their positions count
    from the first slot, and change with every piece. Without one, of all positions in their order,
    keys rotated.
    """

    keys: Float[Array, "G W K"]
    values: Float[Array, "G W K"]
    seen: Int[Array, ""]
    """Tokens read so far. With a window and fewer than W, the first slots are empty; without one,
    the slots from here on are."""


class OpenCache(NamedTuple):
    """A cache with slots for the next C positions behind it.

    The positions of a chunk are the same until it is full, so each key is rotated once.
    """

    keys: Float[Array, "G S K"]
    """As in the cache: not rotated with a window, rotated without."""
    rotated: Float[Array, "G S K"] | None
    """None without a window: `keys` are."""
    values: Float[Array, "G S K"]
    seen: Int[Array, ""]
    """Tokens read before the slots."""


class Attention(AbstractMixer):
    """H query heads over G heads of keys and values, with QK-norm (or without) and rotation.

    With a window W, query t sees keys t − W < j ≤ t; without one, all keys j ≤ t.
    """

    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    scaling: tuple[float, ...] = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    block: int = eqx.field(static=True)
    backend: str = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None,
        theta: float,
        scaling: tuple[float, ...] = (),
        norm_eps: float | None = None,
        bias: bool = False,
        block: int,
        backend: str = "auto",
        scale: float,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        """Fresh weights from N(0, scale²), biases 0.

        norm_eps: of the QK-norms; None: there are none.
        block: queries whose scores are in memory together.
        backend: one of `ttt.knobs.ATTENTION_BACKENDS`.
        """
        queries, keys = heads * head_dim, kv_heads * head_dim
        shapes = {"wq": (width, queries), "wk": (width, keys), "wv": (width, keys)}
        shapes["wo"] = (queries, width)
        self.wq, self.wk, self.wv, self.wo = (
            Linear(*shape, bias=bias and name != "wo", scale=scale, dtype=dtype, key=k)
            for (name, shape), k in zip(shapes.items(), jax.random.split(key, 4), strict=True)
        )
        # One each: two leaves that share a buffer could not be donated.
        self.q_norm, self.k_norm = (
            None if norm_eps is None else RMSNorm(head_dim, eps=norm_eps, dtype=dtype)
            for _ in range(2)
        )
        self.heads, self.kv_heads, self.theta, self.scaling = heads, kv_heads, theta, scaling
        self.window, self.block, self.backend = window, block, backend

    def init_state(self, context: int, dtype: jnp.dtype) -> KeyValueCache:
        """An empty cache: W positions with a window, `context` positions without."""
        positions = context if self.window is None else self.window
        head_dim = self.wk.weight.shape[-1] // self.kv_heads
        empty = jnp.zeros((self.kv_heads, positions, head_dim), dtype)
        return KeyValueCache(empty, empty, jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The whole sequence; T a multiple of the block, or smaller."""
        q, k, v = self._project(x)
        positions = jnp.arange(x.shape[0])
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        return self._output(self._whole(q, k, v))

    def prefill(
        self, x: Float[Array, "T D"], context: int
    ) -> tuple[KeyValueCache, Float[Array, "T D"]]:
        """The first T tokens; T a multiple of the block, or smaller."""
        q, k, v = self._project(x)
        length, positions = x.shape[0], jnp.arange(x.shape[0])
        turned = self._rotate(k, positions)
        q = self._rotate(q, positions)
        if self.window is None and choose(self.backend, x.dtype) == "blocks":
            y = self._whole_growing(q, turned, v)
        else:
            y = self._whole(q, turned, v)
        seen = jnp.full((), length, jnp.int32)
        if self.window is None:
            slots = ((0, 0), (0, context - length), (0, 0))
            cache = KeyValueCache(jnp.pad(turned, slots), jnp.pad(v, slots), seen)
        else:
            slots = ((0, 0), (max(self.window - length, 0), 0), (0, 0))
            last = (jnp.pad(y, slots)[:, -self.window :] for y in (k, v))
            cache = KeyValueCache(*last, seen)
        return cache, self._output(y)

    def _whole(
        self, q: Float[Array, "H T K"], k: Float[Array, "G T K"], v: Float[Array, "G T K"]
    ) -> Float[Array, "H T K"]:
        match choose(self.backend, q.dtype):
            case "naive":
                return attend_naive(q, k, v, window_mask(q.shape[1], 0, self.window, 0))
            case "cudnn":
                return attend_cudnn(q, k, v, window=self.window)
        past = 0 if self.window is None else self.window
        k, v = (jnp.pad(y, ((0, 0), (past, 0), (0, 0))) for y in (k, v))
        return attend(q, k, v, first=past, window=self.window, block=self.block)

    def _whole_growing(
        self, q: Float[Array, "H T K"], k: Float[Array, "G T K"], v: Float[Array, "G T K"]
    ) -> Float[Array, "H T K"]:
        """Blocks of queries, each with the keys up to its own alone: half of the work."""
        block = min(self.block, q.shape[1])

        def one(start: Int[Array, ""]) -> Float[Array, "H B K"]:
            part = jax.lax.dynamic_slice_in_dim(q, start, block, axis=1)
            return attend_growing(part, k, v, start=start, block=min(k.shape[1], _KEY_BLOCK))

        parts = jax.lax.map(one, jnp.arange(0, q.shape[1], block, dtype=jnp.int32))
        return jnp.moveaxis(parts, 0, 1).reshape(q.shape)

    def step(
        self, state: KeyValueCache, x: Float[Array, "C D"]
    ) -> tuple[KeyValueCache, Float[Array, "C D"]]:
        """The next C tokens against the cache and themselves.

        With a window, positions are counted from the cache's first slot, which only differences of
        positions can notice. Without, the cache must have C slots left, and there is no derivative
        in reverse mode.
        """
        new = x.shape[0]
        if self.window is None:
            opened, y = self.put(self.open(state, new), x, jnp.zeros((), jnp.int32))
            return self.close(opened, new), y
        q, k, v = self._project(x)
        keys = jnp.concatenate([state.keys, k], axis=1)
        values = jnp.concatenate([state.values, v], axis=1)
        positions = jnp.arange(self.window + new)
        q = self._rotate(q, positions[self.window :])
        rotated = self._rotate(keys, positions)
        y = self._behind_window(q, rotated, values, self._first(state.seen))
        keys, values = (y[:, new:] for y in (keys, values))
        return KeyValueCache(keys, values, state.seen + new), self._output(y)

    def open(self, state: KeyValueCache, slots: int) -> OpenCache:
        """Empty slots behind a window's cache; without a window they are there already."""
        if self.window is None:
            return OpenCache(state.keys, None, state.values, state.seen)
        rotated = self._rotate(state.keys, jnp.arange(self.window))
        keys, rotated, values = (
            jnp.pad(y, ((0, 0), (0, slots), (0, 0))) for y in (state.keys, rotated, state.values)
        )
        return OpenCache(keys, rotated, values, state.seen)

    def put(
        self, opened: OpenCache, x: Float[Array, "N D"], slot: Int[Array, ""]
    ) -> tuple[OpenCache, Float[Array, "N D"]]:
        """Keys and values of N tokens, written in place."""
        q, k, v = self._project(x)
        at = slot + (opened.seen if self.window is None else self.window)
        positions = at + jnp.arange(x.shape[0], dtype=jnp.int32)
        q, turned = (self._rotate(y, positions) for y in (q, k))

        def written(slots: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, at, axis=1)

        values = written(opened.values, v)
        if opened.rotated is None:
            keys, rotated = written(opened.keys, turned), None
        else:
            keys, rotated = written(opened.keys, k), written(opened.rotated, turned)
        opened = OpenCache(keys, rotated, values, opened.seen)
        return opened, self._output(self._of_slots(q, opened, at))

    def _of_slots(
        self, q: Float[Array, "H N K"], opened: OpenCache, at: Int[Array, ""]
    ) -> Float[Array, "H N K"]:
        """Attention of N queries at the slots from `at` on, whose keys are written."""
        new, slots = q.shape[1], opened.keys.shape[1]
        keys = opened.keys if opened.rotated is None else opened.rotated
        if self.window is None:
            if new > 1 and self.backend != "naive":
                return attend_growing(
                    q, keys, opened.values, start=at, block=min(slots, _KEY_BLOCK)
                )
            first, window = jnp.zeros((), jnp.int32), slots
        else:
            first, window = self._first(opened.seen), self.window
            if new > 1:
                start = at - window
                keys, values = (
                    jax.lax.dynamic_slice_in_dim(y, start, window + new, axis=1)
                    for y in (keys, opened.values)
                )
                return self._behind_window(q, keys, values, jnp.maximum(first - start, 0))
        # All slots, masked: to cut out those that are seen would copy them for every token.
        own = at + jnp.arange(new, dtype=jnp.int32)[:, None]
        slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
        mask = (slot <= own) & (slot > own - window) & (slot >= first)
        return attend_naive(q, keys, opened.values, mask)

    def _behind_window(
        self,
        q: Float[Array, "H N K"],
        keys: Float[Array, "G S K"],
        values: Float[Array, "G S K"],
        first: Int[Array, ""],
    ) -> Float[Array, "H N K"]:
        """N queries, the W keys before them and their own; those from `first` on exist."""
        window, new = keys.shape[1] - q.shape[1], q.shape[1]
        if self.backend == "naive":
            return attend_naive(q, keys, values, window_mask(new, window, window, first))
        block = math.gcd(new, self.block)
        return attend(q, keys, values, first=first, window=window, block=block)

    def close(self, opened: OpenCache, tokens: int) -> KeyValueCache:
        """The cache of the first `tokens` slots and what was before them."""
        keys, values = opened.keys, opened.values
        if self.window is not None:
            keys, values = (y[:, tokens : tokens + self.window] for y in (keys, values))
        return KeyValueCache(keys, values, opened.seen + tokens)

    def _first(self, seen: Int[Array, ""]) -> Int[Array, ""]:
        """The first slot of a window's cache that is filled after `seen` tokens."""
        window = self.window or 0
        return window - jnp.minimum(seen, window)

    def _project(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "_ T K"], ...]:
        """Queries [H, T, K]; keys and values [G, T, K]."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            jnp.swapaxes(w(x).reshape(x.shape[0], count, -1), 0, 1)
            for w, count in zip((self.wq, self.wk, self.wv), heads, strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rotate(
        self, x: Float[Array, "_ T K"], positions: Int[Array, " T"]
    ) -> Float[Array, "_ T K"]:
        return rotate(x, positions, self.theta, self.scaling)

    def _output(self, y: Float[Array, "H T K"]) -> Float[Array, "T D"]:
        return self.wo(jnp.swapaxes(y, 0, 1).reshape(y.shape[1], -1))
