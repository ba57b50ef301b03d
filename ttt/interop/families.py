"""What is known of each family of foreign models: its sizes, names and layout. No JAX.

Llama (SmolLM2 too), Qwen2 and Qwen3 are one architecture with switches: norms before attention and
MLP only, SwiGLU, rotation, grouped keys. `Facts` are the switches and sizes of one model; `PARTS`
says where each tensor goes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ttt.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3")
"""As `model_type` of a config.json and `general.architecture` of a GGUF file name them."""


@dataclass(frozen=True)
class Facts:
    """Sizes and switches of one foreign model."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: tuple[float, ...]
    """Llama 3's (factor, low_freq_factor, high_freq_factor, original positions), or nothing."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    positions: int
    """Tokens of the longest sequence it was trained on."""
    eos_token_id: int | None


SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "qk_norm",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "tie_word_embeddings",
    "eos_token_id",
)
"""Facts that a `ttt.knobs.ModelConfig` has under the same names."""


class Part(NamedTuple):
    """One tensor of a layer, or of the whole model."""

    target: str
    """Its published name, behind `…h.blocks.` for a layer's."""
    hf: str
    gguf: str
    matrix: bool = False
    """Whether it is stored [out, in] and used [in, out]."""
    turned: str = ""
    """`q` or `k` where its rows are turned by the rotation, head by head."""
    present: Callable[[Facts], bool] = lambda facts: True


def _biased(facts: Facts) -> bool:
    return facts.attention_bias


def _normed(facts: Facts) -> bool:
    return facts.qk_norm


_MIX, _MLP = "seq_modeling_block", "feed_forward"
LAYER = (
    Part("seq_norm.weight", "input_layernorm.weight", "attn_norm.weight"),
    Part(f"{_MIX}.wq.weight", "self_attn.q_proj.weight", "attn_q.weight", True, "q"),
    Part(f"{_MIX}.wk.weight", "self_attn.k_proj.weight", "attn_k.weight", True, "k"),
    Part(f"{_MIX}.wv.weight", "self_attn.v_proj.weight", "attn_v.weight", True),
    Part(f"{_MIX}.wo.weight", "self_attn.o_proj.weight", "attn_output.weight", True),
    Part(f"{_MIX}.wq.bias", "self_attn.q_proj.bias", "attn_q.bias", False, "q", _biased),
    Part(f"{_MIX}.wk.bias", "self_attn.k_proj.bias", "attn_k.bias", False, "k", _biased),
    Part(f"{_MIX}.wv.bias", "self_attn.v_proj.bias", "attn_v.bias", False, "", _biased),
    Part(f"{_MIX}.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight", False, "q",
         _normed),
    Part(f"{_MIX}.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight", False, "k",
         _normed),
    # A norm before the MLP, in spite of its name.
    Part("ffn_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
    Part(f"{_MLP}.w1.weight", "mlp.gate_proj.weight", "ffn_gate.weight", True),
    Part(f"{_MLP}.w3.weight", "mlp.up_proj.weight", "ffn_up.weight", True),
    Part(f"{_MLP}.w2.weight", "mlp.down_proj.weight", "ffn_down.weight", True),
)  # fmt: skip
"""The tensors of a layer. HF: behind `model.layers.I.`, GGUF: behind `blk.I.`."""
EMBEDDING = Part(
    "language_model.model.wte.weight", "model.embed_tokens.weight", "token_embd.weight"
)
HEAD = Part("language_model.lm_head.weight", "lm_head.weight", "output.weight", True)
WHOLE = (
    EMBEDDING,
    Part("language_model.model.ln_f.weight", "model.norm.weight", "output_norm.weight"),
    HEAD,
)
BLOCKS = "language_model.model.h.blocks."
"""What a layer's published names begin with."""


def parts(facts: Facts) -> list[tuple[Part, bool]]:
    """The tensors of a model, each with whether every layer has one."""
    layer = [(part, True) for part in LAYER if part.present(facts)]
    tied = facts.tie_word_embeddings
    return [*((part, False) for part in WHOLE if not (tied and part is HEAD)), *layer]


def shape(part: Part, facts: Facts) -> tuple[int, ...]:
    """As stored by the foreign program: [out, in] or [size]."""
    width, inner = facts.hidden_size, facts.intermediate_size
    queries = facts.num_attention_heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    where = part.target.split(".")
    match where[-2]:
        case "wte" | "lm_head":
            return (facts.vocab_size, width)
        case "q_norm" | "k_norm":
            return (facts.head_dim,)
        case "wq" | "wk" | "wv" as name:
            out = queries if name == "wq" else keys
            return (out, width) if part.matrix else (out,)
        case "wo":
            return (width, queries)
        case "w1" | "w3":
            return (inner, width)
        case "w2":
            return (width, inner)
    return (width,)


def parameters(facts: Facts) -> int:
    """Numbers in all of a model's tensors."""
    layers = facts.num_hidden_layers
    return sum(math.prod(shape(p, facts)) * (layers if each else 1) for p, each in parts(facts))


# ---- from the foreign programs' descriptions -----------------------------------------


def of_hf(config: Mapping[str, Any], where: str) -> Facts:
    """The facts in a Hugging Face config.json; raises UserError for what we cannot compute."""
    family = config.get("model_type")
    _known_family(family, f"{where}: model_type")
    _refuse(where, config, "hidden_act", ("silu",), "the MLPs must be SwiGLU")
    _refuse(where, config, "mlp_bias", (False,), "MLPs with biases are not supported")
    _refuse(where, config, "rope_interleaved", (False,), "its rotation must be half-split")
    _refuse(where, config, "use_sliding_window", (False,), _WINDOW)
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        raise UserError(f"{where}: layer_types={sorted(kinds)}: {_WINDOW}")
    missing = [key for key in _HF_KEYS if key not in config]
    if missing:
        raise UserError(
            f"{where}: lacks {', '.join(missing)}; take the config.json that lies beside the "
            "weights, unchanged"
        )
    bias = config.get("attention_bias", False)
    if bias and family != "qwen2":
        raise UserError(
            f"{where}: attention_bias={bias}: a bias of the output projection is not supported; "
            "choose another model"
        )
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    eos = config.get("eos_token_id")
    return Facts(
        family=str(family),
        vocab_size=config["vocab_size"],
        hidden_size=width,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else width // heads),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=float(theta),
        rope_scaling=_scaling_of_hf(config.get("rope_scaling") or rope or {}, where),
        rms_norm_eps=float(config["rms_norm_eps"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        positions=config["max_position_embeddings"],
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
    )


_HF_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_WINDOW = (
    "weights trained with a sliding window are not imported, for their full attention is another "
    "function; choose a model without"
)


def _known_family(family: Any, what: str) -> None:
    if family not in FAMILIES:
        raise UserError(
            f"{what}={family}: no such family is supported; there are {', '.join(FAMILIES)}"
        )


def _refuse(where: str, config: Mapping[str, Any], key: str, good: tuple, why: str) -> None:
    if config.get(key, good[0]) not in good:
        raise UserError(f"{where}: {key}={config[key]}: {why}; choose another model")


def _scaling_of_hf(scaling: Mapping[str, Any], where: str) -> tuple[float, ...]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return ()
    if kind != "llama3":
        raise UserError(f"{where}: rope_scaling of type {kind} is not implemented; there is llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if key not in scaling]:
        raise UserError(f"{where}: rope_scaling lacks {', '.join(missing)}; complete it")
    return tuple(float(scaling[key]) for key in keys)


def of_gguf(
    metadata: Mapping[str, Any], tied: bool, stretch: np.ndarray | None, where: str
) -> Facts:
    """The facts in a GGUF file's metadata; raises UserError for what we cannot compute.

    tied: whether it has no output matrix. stretch: its `rope_freqs.weight`, if any.
    """
    arch = metadata.get("general.architecture")
    _known_family(arch, f"{where}: general.architecture")

    def get(key: str, *default: Any) -> Any:
        if f"{arch}.{key}" not in metadata and not default:
            raise UserError(f"{where}: its metadata lacks {arch}.{key}; convert the model again")
        return metadata.get(f"{arch}.{key}", *default)

    if window := get("attention.sliding_window", None):
        raise UserError(f"{where}: {arch}.attention.sliding_window={window}: {_WINDOW}")
    kind = get("rope.scaling.type", "none")
    if kind != "none":
        raise UserError(f"{where}: {arch}.rope.scaling.type={kind} is not implemented")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    if (turned := get("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(
            f"{where}: {arch}.rope.dimension_count={turned}: heads of {head_dim} must be turned "
            "whole; choose another model"
        )
    theta = float(get("rope.freq_base", 10000.0))
    return Facts(
        family=str(arch),
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        attention_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        rope_theta=float(f"{theta:.6g}"),
        rope_scaling=_scaling_of_stretch(stretch, theta, head_dim, where),
        # A float32 in the file: 1e-5 reads 9.9999997e-06.
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.3g}"),
        tie_word_embeddings=tied,
        positions=get("context_length"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
    )


# Llama 3.1 and 3.2; the file holds only what follows from them.
_KNOWN_SCALINGS = ((8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0))


def _scaling_of_stretch(
    stretch: np.ndarray | None, theta: float, head_dim: int, where: str
) -> tuple[float, ...]:
    if stretch is None:
        return ()
    turns = inverse_frequencies(head_dim, theta, ())
    for scaling in _KNOWN_SCALINGS:
        expected = turns / inverse_frequencies(head_dim, theta, scaling)
        if stretch.shape == expected.shape and np.allclose(stretch, expected, rtol=1e-4):
            return scaling
    raise UserError(
        f"{where}: rope_freqs.weight is that of no known scaling (Llama 3.1, 3.2); take the model "
        "as a Hugging Face folder, whose config.json states it"
    )


def inverse_frequencies(
    head_dim: int, theta: float, scaling: tuple[float, ...], dtype: type = np.float64
) -> np.ndarray:
    """Radians per position of each of the head's pairs, as Llama 3's authors describe them.

    Wave lengths above positions/low are `factor` times longer, those below positions/high stay.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling:
        factor, low, high, positions = scaling
        wave = 2 * np.pi / frequency
        smooth = (positions / wave - low) / (high - low)
        blended = (1 - smooth) * frequency / factor + smooth * frequency
        frequency = np.where(
            wave > positions / low,
            frequency / factor,
            np.where(wave < positions / high, frequency, blended),
        )
    return frequency.astype(dtype)
