"""A foreign model -> a checkpoint of ours, audited and checked against its own forward pass.

The checkpoint is that of a run which has taken no step: weights, settings, tokenizer, audit and
provenance, but no optimizer state. It is written whole or not at all.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttt.config import compose, resolve, to_dict
from ttt.core.tree import nested
from ttt.dataloader import text
from ttt.dataloader.text import FileTokenizer
from ttt.errors import RunError, UserError
from ttt.infra import step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.record import write_whole
from ttt.interop import families, reference
from ttt.interop.catalog import run_name
from ttt.interop.convert import AuditRow, check_names, convert
from ttt.interop.families import SHARED, Facts
from ttt.interop.sources import Source
from ttt.knobs import Config
from ttt.model import published
from ttt.model.transformer import MetaModel, run_blocks

logger = logging.getLogger(__name__)

LOGITS_WITHIN, LOSS_WITHIN = 2e-3, 2e-5
"""Bounds of the check, on every logit and on the mean loss (nats per token). A wrong eps is seen by
the first alone (0.04 for SmolLM2), a wrong pairing or base by both."""
LONGEST = 8192
"""Most tokens of a sequence unless the user says otherwise: caches of 128K would take 9 GB of a
Llama-3.2-1B. The model's own number of positions stands in the provenance."""
CHECK_TOKENS = 64
CHECK_TEXT = """\
def mean(values: list[float]) -> float:
    \"\"\"The arithmetic mean of values; raises ValueError if there are none.\"\"\"
    if not values:
        raise ValueError("mean of no values")
    return sum(values) / len(values)

On 14 July 1789 a crowd took the Bastille, a prison in Paris that held seven people. The king wrote
in his diary that nothing had happened; he meant that he had shot no deer.
"""
"""What the check reads: code, prose, numbers, in more than `CHECK_TOKENS` tokens of any family."""


class Imported(NamedTuple):
    """What an import left."""

    folder: Path
    """Of the checkpoint."""
    config: Config
    check: dict[str, float]
    audit: list[AuditRow]


def settings(facts: Facts, name: str, exp_folder: str, bos_token_id: int) -> Config:
    """The configuration of a run that holds such a model."""
    values = {
        "model.name": name,
        **{f"model.{key}": getattr(facts, key) for key in SHARED},
        "model.bos_token_id": bos_token_id,
        "model.eos_token_id": bos_token_id if facts.eos_token_id is None else facts.eos_token_id,
        "model.post_norm": False,
        "model.compute_dtype": "fp32",
        "model.remat_prefix": "none",
        "model.remat_suffix": "none",
        "training.exp_folder": exp_folder,
        "training.exp_name": run_name(name),
        "training.dataset_name": "builtin_imported",
        "training.seq_length": min(facts.positions, LONGEST),
        "training.global_batch_size": 1,
        "training.total_steps": 1,
        "training.optimizer_outer.lr": 1e-4,
        "training.eval_batch_size": 1,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return resolve(compose(["+method=fa", *overrides]))


def import_model(
    source: Source,
    name: str,
    *,
    root: str | Path,
    exp_folder: str,
    about: dict[str, Any],
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Import `source` as the run `exp_folder/import-NAME-fa-base` below the checkpoint root.

    about: what is known of the source beside its files, for its provenance.
    force: replace an import that is there.
    on_progress: hears how many tensors of how many are converted.
    Raises UserError before anything is written: for a source that is incomplete or damaged, a root
    that cannot be written to, an import that is there. RunError: the check failed.
    """
    folder = step_folders.run_folder(root, exp_folder, run_name(name))
    check_free(folder, force)
    check_writable(folder)
    check_names(source)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / text.TOKENIZER_FILE
        source.tokenizer().save(str(file))
        tokenizer = FileTokenizer(file)
        if tokenizer.vocab_size > source.facts.vocab_size:
            raise UserError(
                f"{source.path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the "
                f"embedding rows up to {source.facts.vocab_size - 1}: it is another model's; fetch "
                "the folder anew"
            )
        config = settings(source.facts, name, exp_folder, tokenizer.bos_token_id)
        arrays, audit = convert(source, on_progress)
        ids = tokenizer.encode(CHECK_TEXT)[:CHECK_TOKENS]
        check = compare(source, network(config, arrays, source.path), ids)
        known = provenance(source, tokenizer, about, check)
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # of an import that was cut off
        checkpoints = Checkpoints(new)
        checkpoints.save(
            0,
            model_weights=nested(arrays),
            opt_state=None,
            loader_state={},
            manifest={
                "config": to_dict(config),
                "data": {},
                "provenance": known,
                **text.about_tokenizer(tokenizer),
            },
            files={
                **text.tokenizer_files(tokenizer),
                "audit.json": (json.dumps([asdict(r) for r in audit], indent=1) + "\n").encode(),
            },
        )
        checkpoints.wait()
    step = folder / "0"
    hashes = hashlib.sha256((new / "0" / "hashes.json").read_bytes()).hexdigest()
    latest = {"step": 0, "path": str(step), "hashes_sha256": hashes, "provenance": known}
    write_whole(new / "latest.json", json.dumps(latest, indent=1) + "\n")
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    return Imported(step, config, check, audit)


def check_free(folder: Path, force: bool) -> None:
    """Raise a UserError for an import that is there, unless forced, and for anything else."""
    if not folder.exists():
        return
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest()
    if step is None or not step_folders.read_manifest(checkpoints.find()).get("provenance"):
        raise UserError(f"{folder} is in the way and holds no import; move it away")
    if (checkpoints.find() / "opt_state").is_dir():
        raise UserError(f"{folder} holds a run that was trained; choose another --exp-folder")
    if not force:
        raise UserError(
            f"{checkpoints.find()} holds an import of other files already, and nothing is "
            "overwritten; use it, or put this one in its place with --force"
        )


def imported_before(source: Source, name: str, *, root: str | Path, exp_folder: str) -> Path | None:
    """The checkpoint that `import_model` made of the very same files; None: there is none."""
    checkpoints = Checkpoints(step_folders.run_folder(root, exp_folder, run_name(name)))
    if checkpoints.latest() is None:
        return None
    known = step_folders.read_manifest(checkpoints.find()).get("provenance") or {}
    same = known.get("files") == json.loads(json.dumps(source.hashes))
    return checkpoints.find() if same else None


def check_writable(folder: Path) -> None:
    """Raise a UserError unless `folder` can be made or written to."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(
            f"{folder} cannot be made: {place} is no folder that you may write to; choose another "
            "checkpoint root (--checkpoint-root)"
        )


def provenance(
    source: Source, tokenizer: FileTokenizer, about: dict[str, Any], check: dict[str, float]
) -> dict[str, Any]:
    """Where the weights come from, for the checkpoint and every descendant's record."""
    return {
        **about,
        "family": source.facts.family,
        "format": source.kind,
        "licence": source.licence() or about.get("licence", "not stated"),
        "files": source.hashes,
        "stored_as": dict(Counter(source.describe(name)[0] for name in source.names)),
        "parameters": families.parameters(source.facts),
        "tokenizer": tokenizer.fingerprint,
        "eos_token_id": source.facts.eos_token_id,
        "positions": source.facts.positions,
        "check": check,
    }


# ---- the check -----------------------------------------------------------------------


def network(config: Config, arrays: dict[str, np.ndarray], path: Path) -> MetaModel:
    """The network of a configuration with the parameters at `path`: all of them, and no other."""
    own = replace(config.model, remat_prefix="none", remat_suffix="none")
    shapes = jax.eval_shape(lambda: MetaModel(own, key=jax.random.key(0)))
    model, account = published.take(shapes, arrays, path)
    if account.unused or account.initialised:
        raise RunError(f"{path}: {account}")
    return model


@jax.jit
def logits(model: MetaModel, ids: Int[Array, " T"]) -> Float[Array, "T V"]:
    """Behind every token, without test-time learning."""
    chunk = model.config.mini_batch_size
    x = model.prefix(model.embed(ids))
    suffix = model.language_model.model.h.suffix_blocks
    x = model.language_model.model.ln_f(run_blocks(suffix, x, "none", chunk))
    return x @ model.language_model.table.astype(x.dtype).T


def compare(source: Source, model: MetaModel, ids: Int[np.ndarray, " T"]) -> dict[str, float]:
    """Our logits beside those of the source's own tensors in float64; raises RunError.

    Both bounds hold for float32 on a CPU.
    """
    expected = reference.logits(source, ids)
    with jax.default_device(jax.devices("cpu")[0]):
        ours = np.asarray(logits(model, jnp.asarray(ids)), np.float64)
    difference = float(np.max(np.abs(ours - expected)))
    losses = [float(np.mean(reference.nll(x, ids))) for x in (ours, expected)]
    check = {
        "tokens": len(ids),
        "largest_logit_difference": difference,
        "loss": losses[0],
        "loss_difference": abs(losses[0] - losses[1]),
    }
    if not (difference <= LOGITS_WITHIN and check["loss_difference"] <= LOSS_WITHIN):
        raise RunError(
            f"{source.path}: the imported network is not the model: its logits differ by up to "
            f"{difference:.2g} (at most {LOGITS_WITHIN:g}), its loss on {len(ids)} tokens is "
            f"{losses[0]:.6f} and not {losses[1]:.6f}. Nothing was written"
        )
    return check
