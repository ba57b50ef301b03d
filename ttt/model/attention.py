"""Softmax attention as a mixer: full, or within a sliding window."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ttt.config import ModelConfig
from ttt.core.precision import Precision
from ttt.model.layers import Linear, RMSNorm
from ttt.model.mixer import AbstractMixer
from ttt.ops.dot_attention import attend, attend_cudnn, attend_naive, choose, window_mask
from ttt.ops.rotary import rotate


class KeyValueCache(NamedTuple):
    """Keys (after QK-norm, before rotation) and values of the last W positions, newest last."""

    keys: Float[Array, "H W K"]
    values: Float[Array, "H W K"]
    seen: Int[Array, ""]
    """Tokens read so far; with fewer than W, the first slots are empty."""


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

        Without a window the cache holds the whole context, so the one rule serves both: see the
        last W positions. Positions are counted from the cache's first slot, which only differences
        of positions can notice.
        """
        cached, new = state.keys.shape[1], x.shape[0]
        q, k, v = self._project(x)
        keys = jnp.concatenate([state.keys, k], axis=1)
        values = jnp.concatenate([state.values, v], axis=1)
        positions = jnp.arange(cached + new)
        q = rotate(q, positions[cached:], self.theta)
        k = rotate(keys, positions, self.theta)
        first = cached - jnp.minimum(state.seen, cached)
        if self.backend == "naive":
            y = attend_naive(q, k, values, window_mask(new, cached, cached, first))
        else:
            block = math.gcd(new, self.block)
            y = attend(q, k, values, first=first, window=cached, block=block)
        return KeyValueCache(keys[:, new:], values[:, new:], state.seen + new), self._output(y)

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
