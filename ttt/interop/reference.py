"""The forward pass of a foreign model in NumPy, from its own tensors: the check of an import.

It shares nothing with the conversion and the network: names and layout are the source's own. Slow,
for some hundred tokens at most. No JAX.
"""

import numpy as np
from jaxtyping import Float, Int

from ttt.interop import families
from ttt.interop.sources import Source


def logits(
    source: Source, ids: Int[np.ndarray, " T"], dtype: type = np.float64
) -> Float[np.ndarray, "T V"]:
    """The logits behind every token."""
    facts = source.facts

    def tensor(name: str, layer: int | None = None) -> np.ndarray:
        if source.kind == "gguf":
            full = name if layer is None else f"blk.{layer}.{name}"
        else:
            full = _HF[name] if layer is None else f"model.layers.{layer}.{_HF[name]}"
        return source.read(full).astype(dtype)

    embedding = tensor("token_embd.weight")
    x = embedding[ids]
    for layer in range(facts.num_hidden_layers):
        y = _norm(x, tensor("attn_norm.weight", layer), facts.rms_norm_eps)
        q, k, v = (
            _linear(y, tensor(f"attn_{n}.weight", layer))
            + (tensor(f"attn_{n}.bias", layer) if facts.attention_bias else 0)
            for n in "qkv"
        )
        q, k, v = (z.reshape(len(ids), -1, facts.head_dim) for z in (q, k, v))
        if facts.qk_norm:
            q = _norm(q, tensor("attn_q_norm.weight", layer), facts.rms_norm_eps)
            k = _norm(k, tensor("attn_k_norm.weight", layer), facts.rms_norm_eps)
        q, k = _rotated(q, source), _rotated(k, source)
        group = facts.num_attention_heads // facts.num_key_value_heads
        heads = np.empty_like(q)
        for head in range(facts.num_attention_heads):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(facts.head_dim)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
        x = x + _linear(heads.reshape(len(ids), -1), tensor("attn_output.weight", layer))
        y = _norm(x, tensor("ffn_norm.weight", layer), facts.rms_norm_eps)
        gate = _linear(y, tensor("ffn_gate.weight", layer))
        units = gate / (1 + np.exp(-gate)) * _linear(y, tensor("ffn_up.weight", layer))
        x = x + _linear(units, tensor("ffn_down.weight", layer))
    x = _norm(x, tensor("output_norm.weight"), facts.rms_norm_eps)
    return _linear(x, embedding if facts.tie_word_embeddings else tensor("output.weight"))


def nll(logits: Float[np.ndarray, "T V"], ids: Int[np.ndarray, " T"]) -> Float[np.ndarray, " N"]:
    """−log p of ids[1:], in nats."""
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return (total - logits[np.arange(len(ids)), np.roll(ids, -1)])[:-1]


def _norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return gain * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x @ weight.T


def _rotated(x: Float[np.ndarray, "T H K"], source: Source) -> Float[np.ndarray, "T H K"]:
    facts = source.facts
    turns = families.inverse_frequencies(facts.head_dim, facts.rope_theta, facts.rope_scaling)
    angles = np.outer(np.arange(len(x)), turns)[:, None, :]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    half = facts.head_dim // 2
    first, second = slice(0, None, 2), slice(1, None, 2)
    if source.half_split:
        first, second = slice(half), slice(half, None)
    turned = np.empty_like(x)
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


# llama.cpp's names -> Hugging Face's.
_HF = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    **{f"attn_{n}.weight": f"self_attn.{n}_proj.weight" for n in "qkv"},
    **{f"attn_{n}.bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    **{f"attn_{n}_norm.weight": f"self_attn.{n}_norm.weight" for n in "qk"},
}
