"""Name of a mixer -> the mixer."""

from collections.abc import Callable

from jaxtyping import PRNGKeyArray

from ttt.core.precision import Precision
from ttt.knobs import ModelConfig
from ttt.mixers import FullAttention, SlidingAttention
from ttt.model.attention import Attention
from ttt.model.mixer import AbstractMixer


def _attention(config: ModelConfig, window: int | None, key: PRNGKeyArray) -> Attention:
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        window=window,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        norm_eps=config.rms_norm_eps if config.qk_norm else None,
        bias=config.attention_bias,
        block=config.attention_block or config.mini_batch_size,
        backend=config.attention,
        scale=config.initializer_range,
        dtype=Precision.of(config).param,
        key=key,
    )


MAKERS: dict[str, Callable[[ModelConfig, PRNGKeyArray], AbstractMixer]] = {
    FullAttention.name: lambda config, key: _attention(config, None, key),
    SlidingAttention.name: lambda config, key: _attention(config, config.sliding_window_size, key),
}
"""Name in `ttt.mixers.MIXERS` -> the mixer at a configuration's sizes."""
