"""Experiments that follow from their names: size x stage x method x parent x share. No JAX.

The name `125m/adapt/adapt-125m-e2e-8K-from-fa-5pct` is all that its file would hold. The plugin
`hydra_plugins.experiments_ttt` hands these contents to Hydra; a file of the same name wins.
Sizes, methods and contexts are the files in `configs/model`, `configs/method`, `configs/context`.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ttt.figures import short

LEARNER = "e2e"
"""The method that learns at test time, and can start from a network that does not."""
PARENTS = ("fa", "swa")
"""Methods whose networks an adaptation, a bridge or a direct extension can start from."""
DEFAULT_SHARE = 10
"""Percent of the pretraining's steps that an adaptation takes where its name gives no share."""
LISTED_SHARES = (5, 20)
"""The other shares of the published sweep; any whole number of percent makes an experiment."""

PATTERNS = (
    "{size}/pretrain/pretrain-{size}-{method}",
    "{size}/adapt/adapt-{size}-e2e-{own}-from-{parent}{share}",
    "{size}/extension/ext-{size}-{method}-{context}",
    "{size}/extension/ext-{size}-swa-{context}-from-fa",
    "{size}/extension/ext-{size}-e2e-{context}-from-{parent}-direct",
    "{size}/extension/ext-{size}-e2e-{context}-from-{parent}-bridge{share}",
)
"""The names. `own` is the size's context in pretraining, `share` is empty or `-Npct`."""


EXTERNAL = {
    "pretrain-{model}-fa-scratch-8K": ("fa", "pretrain", ""),
    "pretrain-{model}-e2e-scratch-8K": ("e2e", "pretrain", ""),
    "ext-{model}-fa-32K-from-scratch": ("fa", "extension", "pretrain-{model}-fa-scratch-8K"),
    "ext-{model}-e2e-32K-from-scratch": ("e2e", "extension", "pretrain-{model}-e2e-scratch-8K"),
    "pretrain-{model}-fa-import-8K": ("fa", "pretrain", "import-{model}-fa-base"),
    "ext-{model}-fa-32K-from-import": ("fa", "extension", "pretrain-{model}-fa-import-8K"),
    "adapt-{model}-swa-8K-from-import": ("swa", "adaptation", "pretrain-{model}-fa-import-8K"),
    "adapt-{model}-e2e-8K-from-import": ("e2e", "adaptation", "adapt-{model}-swa-8K-from-import"),
    "ext-{model}-e2e-32K-from-import-bridge": (
        "e2e",
        "extension",
        "adapt-{model}-e2e-8K-from-import",
    ),
    "ext-{model}-e2e-32K-from-import-direct": (
        "e2e",
        "extension",
        "pretrain-{model}-fa-import-8K",
    ),
}
"""Run of an imported model's matrix -> (method, stage, run that it starts from), parents first.

Their experiments are `external/MODEL/RUN`; the models are the files in `configs/model/external`.
"""


def share_suffix(percent: int) -> str:
    """The end of a name that tells the share of an adaptation: 5 -> -5pct; the default has none."""
    return "" if percent == DEFAULT_SHARE else f"-{percent}pct"


def adaptation(size: str, own: str, parent: str, percent: int = DEFAULT_SHARE) -> str:
    """The run that adapts a pretraining without test-time training, by name."""
    return f"adapt-{size}-{LEARNER}-{own}-from-{parent}{share_suffix(percent)}"


@cache
def names(configs: Path) -> tuple[str, ...]:
    """All names that a rule makes, with the listed shares, sorted. configs: the config folder."""
    made = (
        pattern.format(**dict(zip(choices, values, strict=True)))
        for pattern, choices in _all_choices(configs)
        for values in product(*choices.values())
    )
    return tuple(sorted([*made, *external_names(configs)]))


@cache
def external_names(configs: Path) -> tuple[str, ...]:
    """The experiments of imported models, parents first."""
    return tuple(
        f"external/{model}/{run.format(model=model)}"
        for model in _files(configs, "model/external")
        for run in EXTERNAL
    )


def short_list(configs: Path) -> list[str]:
    """The names with their choices in braces, as a shell expands them: a line per pattern."""
    lines = []
    for pattern, choices in _all_choices(configs):
        braces = {f: v[0] if len(v) == 1 else f"{{{','.join(v)}}}" for f, v in choices.items()}
        lines.append(pattern.format(**braces))
    models = f"{{{','.join(_files(configs, 'model/external'))}}}"
    lines += [f"external/{models}/{run.replace('{model}', 'MODEL')}" for run in EXTERNAL]
    return lines


@cache
def make(configs: Path, name: str) -> dict[str, Any] | None:
    """The content of the experiment's file, its defaults list included; None: no rule makes it."""
    if name in external_names(configs):
        return _external_content(name)
    size = name.split("/")[0]
    if size not in _files(configs, "model"):
        return None
    for pattern in PATTERNS:
        if (match := re.fullmatch(_regex(configs, size, pattern), name)) is not None:
            return _content(configs, name, match.groupdict())
    return None


def _content(configs: Path, name: str, fields: dict[str, str]) -> dict[str, Any]:
    _, stage, run = name.split("/")
    size, parent = fields["size"], fields.get("parent")
    method = fields.get("method") or (LEARNER if parent else "swa")
    share = int(re.sub(r"\D", "", fields.get("share", "")) or DEFAULT_SHARE)
    training: dict[str, Any] = {"exp_name": run}
    if stage != "pretrain":
        start = f"pretrain-{size}-{parent or fields.get('method', 'fa')}"
        if "-bridge" in run:
            start = adaptation(size, pretraining_context(configs, size), parent or "", share)
        training["resume_exp_name"] = start
    if run.endswith("-direct"):  # as in an adaptation: its prime MLPs have not learned to learn yet
        training["ilr_init"] = 0.1
        training["ilr_warmup_steps"] = "${ttt.floordiv:${training.total_steps},10}"
    content: dict[str, Any] = {
        "defaults": [
            {"/model": size},
            {"/method": method},
            {"/training": "adaptation" if stage == "adapt" else stage},
            *([{"/context": fields["context"]}] if "context" in fields else []),
            "_self_",
        ]
    }
    if stage == "adapt" and share != DEFAULT_SHARE:
        content["size"] = {"adapt_share": share / 100}
    if parent:  # the parent has no prime MLPs: its width is kept, so that its weights fit
        content["model"] = {"width_policy": "full"}
    return content | {"training": training}


def _external_content(name: str) -> dict[str, Any]:
    _, model, run = name.split("/")
    method, stage, parent = EXTERNAL[run.replace(f"-{model}-", "-{model}-", 1)]
    content: dict[str, Any] = {
        "defaults": [
            {"/model": f"external/{model}"},
            {"/method": method},
            {"/training": stage},
            *([{"/context": "32K"}] if stage == "extension" else []),
            "_self_",
        ]
    }
    training: dict[str, Any] = {"exp_name": run, "exp_folder": "external_phase1"}
    if parent:
        training |= {"load_part": "params", "resume_exp_name": parent.format(model=model)}
    if "import" in run:
        # The imported function is kept: its rotary base and MLP width; and rates that do not
        # destroy it. An inner rate of 1 does (docs/external.md).
        content["model"] = {"rope_theta": "${size.rope_theta}", "width_policy": "full"}
        training["optimizer_outer"] = {"lr": "${size.adapt_lr}"}
        if method == LEARNER:
            training["optimizer_inner"] = {"lr": 0.3}
            if stage == "adaptation":  # another order than that of the adaptation before it
                training["data_seed"] = 2000
    if run.endswith("-direct"):
        training["ilr_init"] = 0.1
        training["ilr_warmup_steps"] = "${ttt.floordiv:${training.total_steps},10}"
    return content | {"training": training}


def _regex(configs: Path, size: str, pattern: str) -> str:
    """The pattern as an expression with a group for each field."""
    regex = pattern
    for field, values in _choices(configs, size, pattern).items():
        choice = "|".join(map(re.escape, values))
        if field == "share":
            choice = rf"|-(?!{DEFAULT_SHARE}pct)[1-9]\d?pct"
        regex = regex.replace(f"{{{field}}}", f"(?P<{field}>{choice})", 1)
        regex = regex.replace(f"{{{field}}}", f"(?P={field})")
    return regex


def _all_choices(configs: Path) -> Iterator[tuple[str, dict[str, Sequence[str]]]]:
    for size, pattern in product(_files(configs, "model"), PATTERNS):
        yield pattern, _choices(configs, size, pattern)


def _choices(configs: Path, size: str, pattern: str) -> dict[str, Sequence[str]]:
    """What each field of a pattern can be for a size, in the fields' order."""
    own = pretraining_context(configs, size)
    contexts = sorted(_files(configs, "context"), key=_thousands)
    choices = {
        "size": (size,),
        "method": [m for m in _files(configs, "method") if _fits(configs, size, m)],
        "own": (own,),
        "context": [c for c in contexts if _thousands(c) >= _thousands(own)],
        "parent": PARENTS,
        "share": ("", *map(share_suffix, LISTED_SHARES)),
    }
    return {field: choices[field] for field in dict.fromkeys(re.findall(r"{(\w+)}", pattern))}


# ---- facts of the sizes ------------------------------------------------------------------


@cache
def _files(configs: Path, group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (configs / group).glob("*.yaml")))


@cache
def _setting(path: Path, key: str) -> Any:
    return OmegaConf.select(OmegaConf.load(path), key)


def size_setting(configs: Path, size: str, key: str) -> Any:
    """What the size's file states for `key`, else the default."""
    stated = _setting(configs / "model" / f"{size}.yaml", key)
    return _setting(configs / "config.yaml", key) if stated is None else stated


def pretraining_context(configs: Path, size: str) -> str:
    """The size's context in pretraining and adaptation, by name."""
    return short(size_setting(configs, size, "size.pretrain_seq_length"))


def _thousands(context: str) -> int:
    return int(context.removesuffix("K"))


def _fits(configs: Path, size: str, method: str) -> bool:
    """Whether every mixer of the method's cycle has a layer in a network of this size."""
    cycle = _setting(configs / "method" / f"{method}.yaml", "model.layer_types")
    layers = size_setting(configs, size, "model.num_hidden_layers")
    return len(cycle or ()) <= layers
