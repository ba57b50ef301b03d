"""Softmax attention as a mixer: full, or within a sliding window."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ttt.core.precision import Precision
from ttt.knobs import ModelConfig
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

    keys: Float[Array, "H W K"]
    values: Float[Array, "H W K"]
    seen: Int[Array, ""]
    """Tokens read so far. With a window and fewer than W, the first slots are empty; without one,
    the slots from here on are."""


class OpenCache(NamedTuple):
    """A cache with room for the next C positions behind it, filled one by one.

    The positions of a chunk are the same until it is full, so each key is rotated once.
    """

    keys: Float[Array, "H S K"]
    """As in the cache: not rotated with a window, rotated without."""
    rotated: Float[Array, "H S K"] | None
    """None without a window: `keys` are."""
    values: Float[Array, "H S K"]
    seen: Int[Array, ""]
    """Tokens read before the room."""


class Attention(AbstractMixer):
    """Multi-head attention with optional QK-norm and rotary positions.

    With a window W, query t sees keys t − W < j ≤ t; without one, all keys j ≤ t.
    """

    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    heads: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    block: int = eqx.field(static=True)
    backend: str = eqx.field(static=True)

    def __init__(self, config: ModelConfig, *, window: int | None, key: PRNGKeyArray):
        width, dtype = config.hidden_size, Precision.of(config).param
        self.wq, self.wk, self.wv, self.wo = (
            Linear(width, width, scale=config.initializer_range, dtype=dtype, key=k)
            for k in jax.random.split(key, 4)
        )
        norm = RMSNorm(width // config.num_attention_heads, eps=config.rms_norm_eps, dtype=dtype)
        self.q_norm = self.k_norm = norm if config.qk_norm else None
        self.heads = config.num_attention_heads
        self.theta = config.rope_theta
        self.window = window
        self.block = config.attention_block or config.mini_batch_size
        self.backend = config.attention

    def init_state(self, context: int, dtype: jnp.dtype) -> KeyValueCache:
        """An empty cache: W positions with a window, `context` positions without."""
        positions = context if self.window is None else self.window
        width = self.wk.weight.shape[-1]
        empty = jnp.zeros((self.heads, positions, width // self.heads), dtype)
        return KeyValueCache(empty, empty, jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The whole sequence; T a multiple of the chunk, or smaller."""
        q, k, v = self._project(x)
        positions = jnp.arange(x.shape[0])
        q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        match choose(self.backend, x.dtype):
            case "naive":
                mask = window_mask(x.shape[0], 0, self.window, 0)
                return self._output(attend_naive(q, k, v, mask))
            case "cudnn":
                return self._output(attend_cudnn(q, k, v, window=self.window))
        past = 0 if self.window is None else self.window
        k, v = (jnp.pad(y, ((0, 0), (past, 0), (0, 0))) for y in (k, v))
        return self._output(attend(q, k, v, first=past, window=self.window, block=self.block))

    def step(
        self, state: KeyValueCache, x: Float[Array, "C D"]
    ) -> tuple[KeyValueCache, Float[Array, "C D"]]:
        """The next C tokens against the cache and themselves.

        With a window, positions are counted from the cache's first slot, which only differences of
        positions can notice. Without, the cache must have C slots left, and there is no derivative
        in reverse mode.
        """
        opened, y = self.open(state, x)
        return self.close(opened, x.shape[0]), y

    def open(
        self, state: KeyValueCache, x: Float[Array, "C D"]
    ) -> tuple[OpenCache, Float[Array, "C D"]]:
        """The next C tokens, left open: `put` may write over them from the first that is wrong."""
        q, k, v = self._project(x)
        if self.window is None:
            return self._open_full(state, q, k, v)
        cached, new = self.window, x.shape[0]
        keys = jnp.concatenate([state.keys, k], axis=1)
        values = jnp.concatenate([state.values, v], axis=1)
        positions = jnp.arange(cached + new)
        q = rotate(q, positions[cached:], self.theta)
        rotated = rotate(keys, positions, self.theta)
        first = self._first(state.seen)
        if self.backend == "naive":
            y = attend_naive(q, rotated, values, window_mask(new, cached, cached, first))
        else:
            block = math.gcd(new, self.block)
            y = attend(q, rotated, values, first=first, window=cached, block=block)
        return OpenCache(keys, rotated, values, state.seen), self._output(y)

    def _open_full(
        self,
        state: KeyValueCache,
        q: Float[Array, "H C K"],
        k: Float[Array, "H C K"],
        v: Float[Array, "H C K"],
    ) -> tuple[OpenCache, Float[Array, "C D"]]:
        new, slots = q.shape[1], state.keys.shape[1]
        positions = state.seen + jnp.arange(new, dtype=jnp.int32)
        q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, fresh, state.seen, axis=1)
            for old, fresh in ((state.keys, k), (state.values, v))
        )
        if self.backend == "naive":
            mask = jnp.arange(slots, dtype=jnp.int32)[None, :] <= positions[:, None]
            y = attend_naive(q, keys, values, mask)
        else:
            y = attend_growing(q, keys, values, start=state.seen, block=min(slots, _KEY_BLOCK))
        return OpenCache(keys, None, values, state.seen), self._output(y)

    def room(self, state: KeyValueCache, tokens: int) -> OpenCache:
        """The same state with room for `tokens` more; without a window it is there already."""
        if self.window is None:
            return OpenCache(state.keys, None, state.values, state.seen)
        rotated = rotate(state.keys, jnp.arange(self.window), self.theta)
        wider = (jnp.pad(y, ((0, 0), (0, tokens), (0, 0))) for y in (state.keys, rotated))
        keys, rotated = wider
        values = jnp.pad(state.values, ((0, 0), (0, tokens), (0, 0)))
        return OpenCache(keys, rotated, values, state.seen)

    def put(
        self, opened: OpenCache, x: Float[Array, "1 D"], place: Int[Array, ""]
    ) -> tuple[OpenCache, Float[Array, "1 D"]]:
        """The token at a place of the room, from 0; the places before it are filled."""
        q, k, v = self._project(x)
        slot = place + (opened.seen if self.window is None else self.window)
        q, turned = (rotate(y, slot[None], self.theta) for y in (q, k))

        def written(slots: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=1)

        slots = jnp.arange(opened.keys.shape[1], dtype=jnp.int32)
        visible = slots <= slot
        values = written(opened.values, v)
        if opened.rotated is None or self.window is None:
            keys, rotated = written(opened.keys, turned), None
        else:
            keys, rotated = written(opened.keys, k), written(opened.rotated, turned)
            visible &= (slots > slot - self.window) & (slots >= self._first(opened.seen))
        y = attend_naive(q, keys if rotated is None else rotated, values, visible[None])
        return OpenCache(keys, rotated, values, opened.seen), self._output(y)

    def close(self, opened: OpenCache, tokens: int) -> KeyValueCache:
        """The state after the first `tokens` of the room; those behind them are dropped."""
        keys, values = opened.keys, opened.values
        if self.window is not None:
            keys, values = (y[:, tokens : tokens + self.window] for y in (keys, values))
        return KeyValueCache(keys, values, opened.seen + tokens)

    def _first(self, seen: Int[Array, ""]) -> Int[Array, ""]:
        """The first slot of a window's cache that is filled after `seen` tokens."""
        window = self.window or 0
        return window - jnp.minimum(seen, window)

    def _project(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "H T K"], ...]:
        q, k, v = (
            jnp.swapaxes(w(x).reshape(x.shape[0], self.heads, -1), 0, 1)
            for w in (self.wq, self.wk, self.wv)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _output(self, y: Float[Array, "H T K"]) -> Float[Array, "T D"]:
        return self.wo(jnp.swapaxes(y, 0, 1).reshape(y.shape[1], -1))
