"""A checkpoint of ours -> a Hugging Face folder that other programs read: the inverse of an import.

Llama, Qwen2 and Qwen3 as other programs know them have norms before attention and MLP only, full
attention, and one MLP per block; what they cannot express is refused. The folder is read back by
code that shares nothing with what wrote it, and its logits are compared, before it has its name.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ttt import mixers
from ttt.config import of_stored
from ttt.dataloader import text
from ttt.dataloader.text import TOKENIZER_FILE, FileTokenizer
from ttt.errors import UserError
from ttt.infra import checkpoint, step_folders
from ttt.interop import families, imports
from ttt.interop.convert import half_split
from ttt.interop.families import BLOCKS, SHARED, Facts, Part
from ttt.interop.sources import open_source
from ttt.knobs import Config, ModelConfig

DTYPES = ("auto", "float32", "bfloat16")
"""`auto`: bfloat16 if it holds every number exactly, as after an import of such weights."""
_SEED = 0


class Exported(NamedTuple):
    """What an export left."""

    folder: Path
    dtype: str
    check: dict[str, float]


def export(step_folder: Path, out: Path, *, dtype: str = "auto") -> Exported:
    """Write the checkpoint at `step_folder` as a Hugging Face folder at `out`.

    Raises UserError, before anything is written, for a model that no such family describes, a
    checkpoint without tokenizer or settings, and a folder that exists. RunError: the check failed.
    """
    out = out.expanduser().absolute()
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten; choose another --out")
    imports.check_writable(out)
    manifest = step_folders.read_manifest(step_folder)
    if not manifest:
        raise UserError(
            f"{step_folder} does not say what network it holds (it has no manifest); export a "
            "checkpoint that this framework wrote"
        )
    checkpoint.check_mode(step_folder, "jax")
    config = of_stored(manifest["config"])
    known = manifest.get("provenance") or {}
    facts = facts_of(config, known.get("positions", 0))
    tokenizer = text.checkpoint_tokenizer(step_folder, manifest)
    if not isinstance(tokenizer, FileTokenizer):
        raise UserError(
            f"{step_folder} has no {TOKENIZER_FILE}, and other programs need one; train on a "
            "store that was made with a tokenizer's file (docs/data.md)"
        )
    arrays = checkpoint.read_flat(step_folder, "model_weights")
    model = imports.network(config, arrays, step_folder)
    kind = _dtype(arrays, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_file(tensors(arrays, facts, kind), new / "model.safetensors", {"format": "pt"})
        shutil.copyfile(step_folder / TOKENIZER_FILE, new / TOKENIZER_FILE)
        described = {
            "config.json": hf_config(config.model, facts, kind),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        }
        for name, content in described.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(_card(step_folder, known), encoding="utf-8")
        source = open_source(new)
        ids = np.random.default_rng(_SEED).integers(0, facts.vocab_size, imports.CHECK_TOKENS)
        check = imports.compare(source, _rounded(model, kind), ids)
        new.chmod(0o755)
        (new / "model.safetensors").chmod(0o644)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Exported(out, kind, check)


def facts_of(config: Config, positions: int = 0) -> Facts:
    """The model in the terms of the families; raises UserError with every reason against it.

    positions: that it was imported with.
    """
    model = config.model
    reasons = []
    if model.prime:
        reasons.append("model.prime=true: no other program has its prime MLPs")
    if model.post_norm or not model.pre_norm:
        reasons.append(
            f"model.pre_norm={model.pre_norm}, model.post_norm={model.post_norm}: these families "
            "have norms before attention and MLP, and none behind"
        )
    kinds = set(mixers.layer_types(model))
    if kinds != {mixers.FullAttention.name}:
        reasons.append(f"layers of {', '.join(sorted(kinds))}: these families have full attention")
    if model.attention_bias and model.qk_norm:
        reasons.append(
            "model.attention_bias=true and model.qk_norm=true: Qwen2 has the biases, Qwen3 the "
            "norms, none has both"
        )
    if reasons:
        raise UserError(
            f"{config.training.exp_name} cannot be exported: {'; '.join(reasons)}. Train a model "
            "with model.post_norm=false and +method=fa for that"
        )
    family = "qwen2" if model.attention_bias else "qwen3" if model.qk_norm else "llama"
    shared = {key: getattr(model, key) for key in SHARED}
    return Facts(family=family, positions=max(positions, config.training.seq_length), **shared)


def hf_config(model: ModelConfig, facts: Facts, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = {
        "architectures": [f"{names[facts.family]}ForCausalLM"],
        "model_type": facts.family,
        "hidden_act": "silu",
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_hidden_layers": facts.num_hidden_layers,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.positions,
        "rope_theta": facts.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": facts.rms_norm_eps,
        "tie_word_embeddings": facts.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "torch_dtype": dtype,
    }
    if facts.rope_scaling:
        factor, low, high, positions = facts.rope_scaling
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(positions),
        }
    return config


def tensors(arrays: Mapping[str, np.ndarray], facts: Facts, dtype: str) -> dict[str, np.ndarray]:
    """The parameters under Hugging Face's names, [out, in], heads half-split."""
    kind = np.dtype(np.float32) if dtype == "float32" else np.dtype(jnp.bfloat16)

    def given(part: Part, array: np.ndarray) -> np.ndarray:
        array = array.T if part.matrix else array
        if part.turned:
            array = array[half_split(array.shape[0], facts.head_dim)]
        return np.ascontiguousarray(array.astype(kind))

    named = {}
    for part, each_layer in families.parts(facts):
        if not each_layer:
            named[part.hf] = given(part, arrays[part.target])
            continue
        for layer, array in enumerate(arrays[BLOCKS + part.target]):
            named[f"model.layers.{layer}.{part.hf}"] = given(part, array)
    return named


def _dtype(arrays: Mapping[str, np.ndarray], asked: str) -> str:
    if asked not in DTYPES:
        raise UserError(f"--dtype {asked}: must be one of {', '.join(DTYPES)}; choose one")
    if asked != "auto":
        return asked
    exact = all(np.array_equal(_as_bf16(array), array) for array in arrays.values())
    return "bfloat16" if exact else "float32"


def _as_bf16(array: np.ndarray) -> np.ndarray:
    return array.astype(jnp.bfloat16).astype(np.float32)


def _rounded(model: Any, dtype: str) -> Any:
    """The model whose logits an exported folder must have."""
    return jax.tree.map(_as_bf16, model) if dtype == "bfloat16" else model


def _card(step_folder: Path, known: Mapping[str, Any]) -> str:
    licence = known.get("licence", "")
    head = f"---\nlicense: {licence}\n---\n" if licence and licence != "not stated" else ""
    origin = known.get("repository") or known.get("package") or known.get("model")
    began = f"Its weights began as those of {origin}.\n" if origin else ""
    name, run = step_folder.parts[-2], "/".join(step_folder.parts[-3:])
    return f"{head}# {name}\n\nExported from the checkpoint {run} by `ttt`.\n{began}"
