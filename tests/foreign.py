"""Tiny foreign models for tests: Hugging Face folders of random weights, and GGUF files of them.

`tests/data/foreign` holds them with the logits that transformers 5.24 computed from them in float64
(README there); the tokenizer is made here.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from ttt.interop.sources import HuggingFaceFolder, open_source

DATA = Path(__file__).resolve().parent / "data" / "foreign"
NAMES = ("llama", "llama3", "qwen2", "qwen3")
VOCABULARY = 300
BOS = "<|endoftext|>"
EXPECTED = {
    "llama": {"attention_bias": False, "qk_norm": False, "tie_word_embeddings": False},
    "llama3": {"attention_bias": False, "qk_norm": False, "tie_word_embeddings": True},
    "qwen2": {"attention_bias": True, "qk_norm": False, "tie_word_embeddings": True},
    "qwen3": {"attention_bias": False, "qk_norm": True, "tie_word_embeddings": True},
}


_TEXT = "the rain in Spain stays mainly in the plain while other weather wanders over Norway "


def small_tokenizer():
    """Byte pairs of a text: as many ids as the models have rows, BOS the first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT * 9], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def folder(name: str, place: Path) -> Path:
    """A copy of a model's folder below `place`, with a tokenizer."""
    copy = place / name
    shutil.copytree(DATA / name, copy)
    for path in [copy, *copy.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    small_tokenizer().save(str(copy / "tokenizer.json"))
    return copy


def recorded(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T], logits [T, V]) as transformers computed them."""
    with np.load(DATA / name / "logits.npz") as stored:
        return stored["ids"], stored["logits"]


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder of safetensors."""
    read = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as opened:
            read |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return read


def rewrite(path: Path, changed: dict[str, np.ndarray | None], config: dict | None = None) -> None:
    """Store a folder's tensors in one file, some replaced or (None) left out; and its config."""
    kept = {**tensors(path), **changed}
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file({n: t for n, t in kept.items() if t is not None}, path / "model.safetensors")
    reconfigure(path, config or {})


def reconfigure(path: Path, config: dict) -> None:
    """Change settings of a folder's config; None: leave them out."""
    content = json.loads((path / "config.json").read_text()) | config
    content = {key: value for key, value in content.items() if value is not None}
    (path / "config.json").write_text(json.dumps(content))


def write_gguf(source: Path, target: Path, **metadata) -> Path:
    """A Hugging Face folder as llama.cpp's converter would write it, unquantised.

    metadata: keys without the architecture's prefix, in place of what the folder says.
    """
    opened = open_source(source)
    assert isinstance(opened, HuggingFaceFolder)
    facts, arrays = opened.facts, tensors(source)
    writer = gguf.GGUFWriter(str(target), facts.family)
    arch = facts.family
    numbers = {
        "block_count": facts.num_hidden_layers,
        "context_length": facts.positions,
        "embedding_length": facts.hidden_size,
        "feed_forward_length": facts.intermediate_size,
        "attention.head_count": facts.num_attention_heads,
        "attention.head_count_kv": facts.num_key_value_heads,
        "attention.key_length": facts.head_dim,
        "rope.dimension_count": facts.head_dim,
        **metadata,
    }
    for key, value in numbers.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", facts.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", facts.rms_norm_eps)
    _add_tokenizer(writer, opened.tokenizer())
    for name, array in arrays.items():
        array = array.astype(np.float32)
        heads = {"q_proj": facts.num_attention_heads, "k_proj": facts.num_key_value_heads}
        which = next((h for part, h in heads.items() if part in name), None)
        if arch == "llama" and which:  # llama.cpp's own permutation of query and key rows
            array = (
                array.reshape(which, 2, facts.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
            )
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    if facts.rope_scaling:
        writer.add_tensor("rope_freqs.weight", _stretch(facts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _stretch(facts) -> np.ndarray:
    """What the converter stores of Llama 3's scaling: a divisor for each frequency."""
    factor, low, high, positions = facts.rope_scaling
    divisors = []
    for i in range(0, facts.head_dim, 2):
        wave = 2 * np.pi * facts.rope_theta ** (i / facts.head_dim)
        if wave < positions / high:
            divisors.append(1.0)
        elif wave > positions / low:
            divisors.append(factor)
        else:
            smooth = (positions / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer) -> None:
    content = json.loads(tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(0)


def _gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name
