"""A whole ladder of run records, made up in closed form: what a report should find is known."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import yaml
from builders import MODEL, TRAINING

from ttt.config import to_dict
from ttt.evaluation.result import log_edges
from ttt.infra import record as records
from ttt.infra.record import RunRecord

GIT = {"commit": "0123456789" * 4, "dirty": True}

BATCH, CONTEXT, LONGER = 2, 64, 128
STEPS, EXTENSION = 40, 10
SECONDS = {"fa": 1.0, "swa": 1.2, "e2e": 3.0}
"""Of a step, by method."""
FLOOR = {"B1": 2.50, "B2": 2.58, "P1": 2.504, "P2": 2.53, "P3": 2.507, "S1": 2.60}
"""Validation loss of each path's model; less in a wall-clock-matched path (see `LONGER_GAIN`)."""
LONGER_GAIN = 0.03
COUNT_MODEL = 3.5
SEED_EFFECT = 0.02
"""All paths of a seed are that much worse per seed."""
WIGGLE = {0: 0.0, 1: 0.001, 2: -0.001}
"""What a path's seeds vary by against B1's."""

STAGES = {
    "B1": (("pretrain", "e2e"), ("extend", "e2e")),
    "B2": (("pretrain", "fa"), ("extend", "fa")),
    "P1": (("pretrain", "fa"), ("adapt", "e2e"), ("extend", "e2e")),
    "P2": (("pretrain", "fa"), ("extend", "e2e")),
    "P3": (("pretrain", "swa"), ("adapt", "e2e"), ("extend", "e2e")),
    "S1": (("pretrain", "fa"), ("extend", "swa")),
}
ADAPT = 4


@dataclass
class Made:
    """One run to be written."""

    name: str
    stage: str
    method: str
    seed: int
    steps: int
    loss: float
    parent: "Made | None" = None
    context: int = CONTEXT
    status: str = "finished"
    devices: tuple[str, ...] = ("cpu",)
    count_model: float = COUNT_MODEL
    mode: str = "jax"
    documents: int = 0
    """In the sums of the final evaluation; 0: as in older records."""
    gates: list = field(
        default_factory=lambda: [
            {"name": "finite loss", "holds": True, "said": "all"},
            {"name": "warm start", "holds": None, "said": "not applicable"},
        ]
    )

    @property
    def tokens(self) -> int:
        return self.steps * BATCH * self.context

    @property
    def step_seconds(self) -> float:
        return self.steps * SECONDS[self.method] * self.context / CONTEXT

    @property
    def train_mode(self) -> str:
        return "meta" if self.method == "e2e" else "pretrain"

    @property
    def grows(self) -> bool:
        """Whether it has prime MLPs that its parent had not."""
        return self.method == "e2e" and self.parent is not None and self.parent.method != "e2e"

    def planned(self) -> dict:
        """The manifest's entry."""
        return {
            "name": self.name,
            "experiment": f"test/{self.stage}/{self.name}",
            "stage": self.stage,
            "method": self.method,
            "parent": self.parent.name if self.parent else None,
            "seed": self.seed,
            "steps": self.steps,
            "tokens": self.tokens,
            "overrides": [],
            "command": "train",
            "status": self.status,
            "gates": self.gates,
        }


def settings(made: Made, checkpoints: Path) -> dict:
    """As `config.yaml` has them."""
    block = "self_attention" if made.method == "fa" else "SWA"
    prime = made.method == "e2e"
    return {
        "model": to_dict(MODEL) | {"seq_modeling_block": block, "prime": prime},
        "training": to_dict(TRAINING)
        | {
            "exp_folder": "ladder",
            "exp_name": made.name,
            "runtime_mode": made.mode,
            "train_mode": made.train_mode,
            "seq_length": made.context,
            "global_batch_size": BATCH,
            "total_steps": made.steps,
            "model_seed": made.seed,
            "load_part": "params" if made.parent else "none",
            "resume_exp_name": made.parent.name if made.parent else "",
        },
        "deploy_paths": {"checkpoint": str(checkpoints)},
    }


def write_run(root: Path, made: Made) -> RunRecord:
    """The record that `train` would leave."""
    record = RunRecord(root / "ladder" / made.name)
    with mock.patch.object(records, "_git", return_value=GIT):  # or it takes seconds
        record.start(
            settings(made, root / "checkpoints"),
            devices=list(made.devices),
            data={"train": "sha256:t", "val": f"sha256:{made.context}"},
        )
    begin = made.parent.loss if made.parent else 5.5
    if made.parent:
        there = root / "checkpoints/ladder" / made.parent.name / str(made.parent.steps)
        record.note(
            restored={
                "from": str(there),
                "part": "params",
                "restored": ["a", "b", "c"],
                "initialised": ["d"] if made.grows else [],
                "narrowed": [],
                "moved": ["b -> d"] if made.grows else [],
                "cast": [],
                "unused": [],
            }
        )
    if made.mode == "jax":
        record.note(start=_start(made, begin))
    rng = np.random.default_rng([made.seed, len(made.name)])
    seconds = SECONDS[made.method] * made.context / CONTEXT
    for step in range(1, made.steps + 1):
        loss = made.loss + (begin - made.loss) * math.exp(-4 * step / made.steps)
        measured = {} if made.mode == "simulate" else {"loss": loss + 0.02 * rng.normal()}
        speed = {
            "tokens_per_second": BATCH * made.context / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": 0.01,
        }
        record.log(step, **measured, **speed)
    record.spent(
        {
            "step": made.step_seconds,
            "data_wait": 0.01 * made.steps,
            "save": 0.5,
            "compile": 7.0,
            "evaluation": 3.0,
        }
    )
    if made.mode != "simulate" and made.status == "finished":
        _evaluate(record, made)
    record.finish(made.status)
    return record


def _start(made: Made, begin: float) -> dict:
    parent = made.parent.loss if made.parent else None
    return {
        "loss": begin,
        "loss_without_learning": begin if made.method == "e2e" else None,
        "parent_loss": parent,
        "warm_loss": parent,
        "context": made.parent.context if made.parent else None,
        "preserving": made.parent is not None,
        "why": "" if made.parent else "fresh weights",
    }


def _evaluate(record: RunRecord, made: Made) -> None:
    """Losses that fall with position, and more so where the model learns while it reads."""
    at = np.arange(made.context)
    shape = {"fa": 0.3, "swa": 0.2, "e2e": 0.4}[made.method]
    curve = shape * (np.exp(-at / 20) - np.exp(-at / 20).mean())
    nll, count = 8 * (made.loss + curve), np.full(made.context, 8.0)
    arrays = {"learning_nll": nll, "learning_count": count}
    if made.documents:
        arrays |= by_document(made, curve)
    learns = made.train_mode == "meta"
    without = {"token_loss_without_learning": made.loss + 0.1, "loss_without_learning": 0.0}
    record.save_arrays(
        "loss_by_position",
        made.steps,
        arrays,
        {
            "seq_length": made.context,
            "loss": made.loss,
            "token_loss": made.loss,
            "count_model_loss": made.count_model,
            **(without if learns else {}),
        },
    )


def by_document(made: Made, curve: np.ndarray) -> dict[str, np.ndarray]:
    """Documents of one size that vary, in all runs alike and a little in each run of its own."""
    edges = log_edges(made.context)
    count = np.tile(np.diff(edges).astype(float), (made.documents, 1))
    alike = np.random.default_rng(made.documents).normal(0, 0.5, (made.documents, 1))
    own = np.random.default_rng([made.seed, len(made.name)]).normal(0, 0.02, alike.shape)
    effect = alike - alike.mean() + own - own.mean()
    mean = np.add.reduceat(curve, edges[:-1]) + count * (made.loss + effect)
    numbers = np.arange(made.documents)
    sums = {"documents": numbers, "document_nll": mean, "document_count": count}
    return {f"learning_{name}": array for name, array in sums.items()}


def amend(record: RunRecord, **changes: object) -> None:
    """Change the last attempt."""
    path = record.folder / "run.json"
    run = json.loads(path.read_text())
    run["attempts"][-1] |= changes
    path.write_text(json.dumps(run))


def settings_of(record: RunRecord) -> dict:
    return yaml.safe_load((record.folder / "config.yaml").read_text())


def ladder(seeds: int = 3, matchings: tuple[str, ...] = ("tokens", "wall_clock")) -> tuple:
    """Runs by name and the manifest's paths; runs with the same settings are shared."""
    runs: dict[str, Made] = {}
    paths = []
    for matching in matchings:
        for path, stages in STAGES.items():
            for seed in range(seeds):
                chain: list[Made] = []
                for stage, method in stages:
                    chain.append(_stage(runs, path, matching, seed, chain, stage, method))
                paths.append(
                    {
                        "path": path,
                        "matching": matching,
                        "seed": seed,
                        "runs": [made.name for made in chain],
                    }
                )
    return runs, paths


def pretraining_steps(path: str, matching: str) -> int:
    """So many that the path's tokens, or seconds, are those of B1."""
    adapt = ADAPT if any(stage == "adapt" for stage, _ in STAGES[path]) else 0
    if matching == "tokens":
        return STEPS - adapt
    (_, method), *_, (_, last) = STAGES[path]
    per_step = LONGER // CONTEXT
    left = SECONDS["e2e"] * (STEPS - adapt + per_step * EXTENSION)
    return round((left - SECONDS[last] * per_step * EXTENSION) / SECONDS[method])


def _stage(runs, path, matching, seed, chain, stage, method) -> Made:
    effect = SEED_EFFECT * seed
    if stage == "pretrain":
        steps = pretraining_steps(path, matching)
        gain = LONGER_GAIN * math.log2(steps / STEPS)
        made = Made(
            f"pretrain-{method}-{steps}-s{seed}",
            stage,
            method,
            seed,
            steps,
            2.9 + (0.05 if method != "e2e" else 0) + effect - gain,
        )
    else:
        parent = chain[-1]
        gain = LONGER_GAIN * (matching == "wall_clock" and path != "B1")
        last = stage == "extend"
        loss = FLOOR[path] + effect - gain + (0 if path == "B1" else WIGGLE[seed % 3])
        short = "ext" if last else "adapt"
        made = Made(
            f"{short}-{path}-from-{parent.name}",
            stage,
            method,
            seed,
            EXTENSION if last else ADAPT,
            loss if last else loss + 0.35,
            parent,
            LONGER if last else CONTEXT,
        )
    return runs.setdefault(made.name, made)


def write(root: Path, runs: dict[str, Made], paths: list[dict], *, manifest: bool = True) -> Path:
    """Records and manifest below `root`/ladder."""
    with mock.patch.object(os, "fsync"):  # hundreds of them, and no power fails here
        for made in runs.values():
            if made.status != "pending":
                write_run(root, made)
    if manifest:
        write_manifest(root, runs, paths)
    return root / "ladder"


def write_manifest(root: Path, runs: dict[str, Made], paths: list[dict]) -> None:
    planned = {
        "registry": "test",
        "size": "test",
        "flags": {},
        "runtime_mode": "jax",
        "seconds_per_token": {},
        "runs": [made.planned() for made in runs.values()],
        "paths": paths,
    }
    (root / "ladder").mkdir(parents=True, exist_ok=True)
    (root / "ladder" / "manifest.json").write_text(json.dumps(planned))
