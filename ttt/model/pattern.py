"""Name of a mixer -> the mixer."""

from jaxtyping import PRNGKeyArray

from ttt.knobs import ModelConfig
from ttt.model.attention import Attention
from ttt.model.mixer import AbstractMixer


def make_mixer(config: ModelConfig, key: PRNGKeyArray) -> AbstractMixer:
    """The mixer that `seq_modeling_block` names."""
    match config.seq_modeling_block:
        case "self_attention":
            return Attention(config, window=None, key=key)
        case "SWA":
            return Attention(config, window=config.sliding_window_size, key=key)
        case name:
            raise ValueError(f"model.seq_modeling_block={name!r} is none of self_attention, SWA")
