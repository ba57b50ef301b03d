"""The registry of the ladder: its paths, and what a pilot of each size takes.

`configs/research/warmstart_registry.yaml`, read without Hydra and checked all at once. A path's
stages follow from its entry, and their experiments from the stages (ttt/experiment_rules.py).
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttt import experiment_rules as rules
from ttt.config import choices, config_dir, experiments
from ttt.errors import UserError
from ttt.infra.plan_manifest import MATCHINGS

_SHARE = r"-([1-9]\d?)pct$"  # the end of a path's name: the percent of its adaptation
_FOLDERS = {"pretrain": "pretrain", "adapt": "adapt", "extend": "extension"}
_PREFIXES = {"pretrain": "pretrain", "adapt": "adapt", "extend": "ext"}


@dataclass(frozen=True)
class Budget:
    """What a plan is to take; None: as the experiments have it."""

    pretrain_steps: int | None = None
    adapt_steps: int | None = None
    extension_steps: int | None = None
    seq_length: int | None = None
    """Of pretraining and adaptation."""
    extension_length: int | None = None
    global_batch_size: int | None = None
    """Sequences of pretraining; the extension's batch follows from it."""
    window: int | None = None
    chunk: int | None = None


BUDGET = tuple(field.name for field in fields(Budget))
_LISTS = ("paths", "seeds", "matchings", "overrides")


@dataclass(frozen=True)
class Pilot:
    """A budget, and what is done with it."""

    paths: tuple[str, ...]
    seeds: tuple[int, ...]
    matchings: tuple[str, ...]
    overrides: tuple[str, ...]
    """Settings of every run, before those that the user gives."""
    budget: Budget


@dataclass(frozen=True)
class Size:
    """A size of the ladder: the lengths in its experiments' names, and its pilot."""

    name: str
    contexts: Mapping[str, str]
    """Stage -> context as in names."""
    pilot_rules: Mapping[str, Any]
    """As written, interpolations and all: what is given later changes what follows from it."""

    def pilot(self, given: Mapping[str, Any]) -> Pilot:
        """Its defaults, with what is given (None: nothing) in their place; raises UserError."""
        stated = {key: value for key, value in given.items() if value is not None}
        try:
            node = OmegaConf.create({**self.pilot_rules, **stated})
            values: Any = OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(f"sizes.{self.name}.pilot: {error}; correct it") from error
        numbers = {name: values[name] for name in BUDGET}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value}: must be a whole number from 1; change it")
        return Pilot(*(tuple(values[name]) for name in _LISTS), Budget(**numbers))


@dataclass(frozen=True)
class Stage:
    """One run's place in a path."""

    stage: str
    """`pretrain`, `adapt` or `extend`."""
    method: str
    kind: str
    """Stages of one kind cost the same per token."""
    origin: str = ""
    """What the run's name says of where it starts, such as `-from-fa-bridge`."""
    share: float = 1.0
    """Of an adaptation's steps to those of the default adaptation."""

    def run_name(self, size: str, context: str) -> str:
        """The name of its run at a context."""
        middle = "" if self.stage == "pretrain" else f"-{context}"
        return f"{_PREFIXES[self.stage]}-{size}-{self.method}{middle}{self.origin}"

    def experiment(self, size: Size) -> str:
        """The experiment that its run starts from."""
        own = self.run_name(size.name, size.contexts.get(self.stage, ""))
        return f"{size.name}/{_FOLDERS[self.stage]}/{own}"


@dataclass(frozen=True)
class LadderPath:
    """A chain of stages, each the parent of the next."""

    name: str
    title: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Registry:
    """All of it."""

    reference: str
    entries: Mapping[str, Mapping[str, Any]]
    """The paths as they are written, by name."""
    sizes: Mapping[str, Size]

    def size(self, name: str) -> Size:
        """By name, or a UserError that lists them."""
        return self.sizes[one_of(name, self.sizes, "size")]

    def path(self, name: str) -> LadderPath:
        """By name, with a share such as `P1-5pct` or without, or a UserError that lists them."""
        match = re.fullmatch(rf"(.+){_SHARE}", name)
        if match and self.entries.get(match[1], {}).get("adapt"):
            entry, percent = self.entries[match[1]], int(match[2])
        else:
            entry = self.entries[one_of(name, self.entries, "path")]
            percent = rules.DEFAULT_SHARE
        method, title, adapts = entry["method"], entry["title"], entry.get("adapt")
        parent, suffix = entry.get("parent", method), rules.share_suffix(percent)
        stages = [Stage("pretrain", parent, f"pretrain-{parent}")]
        if adapts:
            share, origin = percent / rules.DEFAULT_SHARE, f"-from-{parent}{suffix}"
            stages.append(Stage("adapt", method, f"adapt-{method}", origin, share))
        kind, origin = f"extend-{method}", "" if parent == method else f"-from-{parent}"
        if origin and method == rules.LEARNER:  # with MLPs of full width, as the parent's
            kind += "-full"
            origin += f"-bridge{suffix}" if adapts else "-direct"
        stages.append(Stage("extend", method, kind, origin))
        if suffix:
            title += (
                f", with {percent} % of the pretraining's steps instead of {rules.DEFAULT_SHARE} %"
            )
        return LadderPath(name, title, tuple(stages))


def one_of(name: str, names: Iterable[str], what: str) -> str:
    """The name, if it is one of them; else a UserError."""
    if name not in names:
        raise UserError(f"{what} {name!r}: must be one of {', '.join(names)}; choose one")
    return name


def load(path: Path | None = None) -> Registry:
    """Read and check the registry at `path`, that of the configs by default.

    Raises UserError with every unknown key, missing key and path without experiments.
    """
    path = path or config_dir() / "research" / "warmstart_registry.yaml"
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); repair it") from error
    if not (faults := list(_faults(content))):
        sizes = {}
        for name, entry in content["sizes"].items():
            own = rules.pretraining_context(config_dir(), name)
            contexts = {"adapt": own, "extend": entry["extension"]}
            sizes[name] = Size(name, contexts, content["pilot"] | entry.get("pilot", {}))
        registry = Registry(content["reference"], content["paths"], sizes)
        if not (faults := list(_missing_experiments(registry))):
            return registry
    listed = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(faults, 1))
    raise UserError(f"{path}:\n{listed}")


# ---- what must hold ----------------------------------------------------------------------


def _faults(content: Any) -> Iterator[str]:
    """Everything wrong with the registry's content, as value, rule and remedy."""
    structural = list(_keys("the registry", content, ("reference", "paths", "pilot", "sizes")))
    yield from structural
    if structural:
        return
    paths = content["paths"]
    for name, entry in paths.items():
        yield from _keys(f"paths.{name}", entry, ("title", "method"), "parent", "adapt")
    yield from _unknown("reference", [content["reference"]], paths)
    yield from _unknown("sizes", content["sizes"], choices("model"))
    yield from _keys("pilot", content["pilot"], (*_LISTS, *BUDGET))
    pilots = {"pilot": content["pilot"]}
    for name, entry in content["sizes"].items():
        yield from _keys(f"sizes.{name}", entry, ("extension",), "pilot")
        if isinstance(entry, dict) and "pilot" in entry:
            pilots[f"sizes.{name}.pilot"] = entry["pilot"]
            yield from _keys(f"sizes.{name}.pilot", entry["pilot"], (), *_LISTS, *BUDGET)
    for where, pilot in pilots.items():
        if isinstance(pilot, dict):
            named = (re.sub(_SHARE, "", str(path)) for path in pilot.get("paths", ()))
            yield from _unknown(f"{where}.paths", named, paths)
            yield from _unknown(f"{where}.matchings", pilot.get("matchings", ()), MATCHINGS)


def _missing_experiments(registry: Registry) -> Iterator[str]:
    """Paths that lack an experiment, each with the first that is missing."""
    known = experiments()
    for path in map(registry.path, registry.entries):
        needed = (s.experiment(size) for size in registry.sizes.values() for s in path.stages)
        if missing := next((name for name in needed if name not in known), None):
            close = difflib.get_close_matches(missing, known, n=1)
            yield (
                f"paths.{path.name}: needs the experiment {missing}, which no file or rule makes; "
                f"correct its method, parent or adapt (close to it: {', '.join(close)})"
            )


def _keys(where: str, entry: Any, needed: Sequence[str], *others: str) -> Iterator[str]:
    known = (*needed, *others)
    if not isinstance(entry, dict):
        yield f"{where}={entry}: must be keys with values; write {{{known[0]}: …}}"
        return
    yield from (f"{where}: lacks {key}; add it" for key in needed if key not in entry)
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"{where}.{key}: no such key; remove it{hint}"


def _unknown(where: str, names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{where}={name}: must be one of {', '.join(known)}; choose one, or add it"
