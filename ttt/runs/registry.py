"""The registry of the ladder: which stages there are, which paths they make, what a pilot takes.

`configs/research/warmstart_registry.yaml`, read without Hydra and checked all at once.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttt.config import config_dir
from ttt.errors import UserError

STAGES = ("pretrain", "adapt", "extend")
MATCHINGS = ("own", "tokens", "wall_clock")
"""What makes two paths comparable: nothing (every experiment's own steps), equally many trained
tokens, or equally many seconds of training steps."""


class RegistryError(UserError):
    """A registry that cannot be used; all its faults."""


@dataclass(frozen=True)
class Stage:
    """One run's place in a path."""

    name: str
    experiment: str
    """Below the size's folder, with `{size}` and `{context}` to fill in."""
    kind: str
    """Stages of one kind cost the same per token."""
    corpus: str
    parent: str | None = None
    """The stage whose parameters it starts from."""
    share: float = 1.0
    """Of an adaptation's steps to those of the default adaptation."""

    @property
    def stage(self) -> str:
        """`pretrain`, `adapt` or `extend`."""
        return self.kind.split("-")[0]

    @property
    def method(self) -> str:
        """`fa`, `swa` or `e2e`."""
        return self.kind.split("-")[1]


@dataclass(frozen=True)
class Route:
    """A chain of stages, each the parent of the next."""

    name: str
    says: str
    stages: tuple[Stage, ...]


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
    """What a size adds: how its experiments are called, what it reads, its pilot."""

    name: str
    contexts: Mapping[str, str]
    corpora: Mapping[str, str]
    """Corpus -> dataset."""
    pilot_rules: Mapping[str, Any]
    """As written, interpolations and all: what is given later changes what follows from it."""

    def pilot(self, given: Mapping[str, Any]) -> Pilot:
        """Its defaults, with what is given (None: nothing) in their place; raises UserError."""
        stated = {key: value for key, value in given.items() if value is not None}
        try:
            node = OmegaConf.create({**self.pilot_rules, **stated})
            rules: Any = OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException as error:
            raise RegistryError(f"sizes.{self.name}.pilot: {error}; correct it") from error
        numbers = {field.name: rules[field.name] for field in fields(Budget)}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value}: must be a whole number from 1; change it")
        lists = (tuple(rules.get(name, ())) for name in _PILOT_LISTS)
        return Pilot(*lists, Budget(**numbers))


@dataclass(frozen=True)
class Registry:
    """All of it."""

    reference: str
    corpora: Mapping[str, str]
    stages: Mapping[str, Stage]
    paths: Mapping[str, Route]
    sizes: Mapping[str, Size]

    def size(self, name: str) -> Size:
        """By name, or a UserError that lists them."""
        return self.sizes[one_of(name, self.sizes, "size")]

    def path(self, name: str) -> Route:
        """By name, or a UserError that lists them."""
        return self.paths[one_of(name, self.paths, "path")]


def one_of(name: str, names: Mapping[str, Any] | tuple[str, ...], what: str) -> str:
    """The name, if it is one of them; else a UserError."""
    if name not in names:
        raise UserError(f"{what} {name!r}: must be one of {', '.join(names)}; choose one")
    return name


def load(path: Path | None = None) -> Registry:
    """Read and check the registry at `path`, that of the configs by default.

    Raises RegistryError with every unknown key, missing key, dangling name and broken chain.
    """
    path = path or config_dir() / "research" / "warmstart_registry.yaml"
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise RegistryError(f"{path}: cannot be read ({error}); repair it") from error
    faults = list(_faults(content))
    if faults:
        listed = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(faults, 1))
        raise RegistryError(f"{path}:\n{listed}")
    stages = {name: Stage(name, **entry) for name, entry in content["stages"].items()}
    paths = {
        name: Route(name, entry["says"], tuple(stages[stage] for stage in entry["stages"]))
        for name, entry in content["paths"].items()
    }
    corpora = content["corpora"]
    sizes = {
        name: Size(name, entry["contexts"], corpora | entry.get("corpora", {}), entry["pilot"])
        for name, entry in content["sizes"].items()
    }
    return Registry(content["reference"], corpora, stages, paths, sizes)


# ---- what must hold ----------------------------------------------------------------------

_STAGE_KEYS = ("experiment", "kind", "corpus")
_PILOT_LISTS = ("paths", "seeds", "matchings", "overrides")
_PILOT_KEYS = (*_PILOT_LISTS[:-1], *(field.name for field in fields(Budget)))


def _faults(content: Any) -> Iterator[str]:
    """Everything wrong with the registry's content, as value, rule and remedy."""
    sections = ("reference", "corpora", "stages", "paths", "sizes")
    yield from (structural := list(_keys("the registry", content, sections)))
    if structural:
        return
    for name, entry in content["stages"].items():
        yield from (found := list(_keys(f"stages.{name}", entry, _STAGE_KEYS, "parent", "share")))
        if not found:
            yield from _stage_faults(name, entry, content)
    yield from _circles(content["stages"])
    for name, entry in content["paths"].items():
        yield from (found := list(_keys(f"paths.{name}", entry, ("says", "stages"))))
        if not found:
            yield from _path_faults(name, entry["stages"], content["stages"])
    if content["reference"] not in content["paths"]:
        yield _dangling("reference", content["reference"], content["paths"])
    for name, entry in content["sizes"].items():
        where = f"sizes.{name}"
        yield from (found := list(_keys(where, entry, ("contexts", "pilot"), "corpora")))
        if not found:
            yield from _keys(f"{where}.contexts", entry["contexts"], ("adapt", "extend"))
            yield from _keys(f"{where}.pilot", entry["pilot"], _PILOT_KEYS, "overrides")
            for corpus in entry.get("corpora", {}):
                if corpus not in content["corpora"]:
                    yield _dangling(f"{where}.corpora", corpus, content["corpora"])
            for path in entry["pilot"].get("paths", ()):
                if path not in content["paths"]:
                    yield _dangling(f"{where}.pilot.paths", path, content["paths"])
            for matching in entry["pilot"].get("matchings", ()):
                if matching not in MATCHINGS:
                    yield _dangling(f"{where}.pilot.matchings", matching, MATCHINGS)


def _stage_faults(name: str, entry: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    where = f"stages.{name}"
    parts = str(entry["kind"]).split("-")
    if len(parts) < 2 or parts[0] not in STAGES or parts[1] not in ("fa", "swa", "e2e"):
        yield (
            f"{where}.kind={entry['kind']}: must be STAGE-METHOD, of {', '.join(STAGES)} and fa, "
            "swa, e2e; correct it"
        )
    if entry["corpus"] not in content["corpora"]:
        yield _dangling(f"{where}.corpus", entry["corpus"], content["corpora"])
    parent = entry.get("parent")
    if parent is not None and parent not in content["stages"]:
        yield _dangling(f"{where}.parent", parent, content["stages"])
    if (parent is None) != (parts[0] == "pretrain"):
        yield (
            f"{where}.parent={parent}: a pretraining has no parent and every other stage has one; "
            "correct it, or the kind"
        )
    share = entry.get("share", 1.0)
    if not isinstance(share, int | float) or share <= 0:
        yield f"{where}.share={share}: must be a number above 0; correct it"


def _path_faults(name: str, names: Any, stages: Mapping[str, Any]) -> Iterator[str]:
    where = f"paths.{name}.stages"
    unknown = [stage for stage in names if stage not in stages]
    yield from (_dangling(where, stage, stages) for stage in unknown)
    if unknown:
        return
    for before, stage in zip([None, *names], names, strict=False):
        parent = stages[stage].get("parent")
        if parent != before:
            yield f"{where}: {stage} starts from {parent}, not from {before}; put that before it"


def _circles(stages: Mapping[str, Any]) -> Iterator[str]:
    for name in stages:
        seen, now = {name}, name
        while (now := (stages.get(now) or {}).get("parent")) is not None and now not in seen:
            seen.add(now)
        if now == name:
            yield f"stages.{name}.parent: its line of parents leads back to it; break the circle"


def _keys(where: str, entry: Any, needed: tuple[str, ...], *others: str) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{where}={entry}: must be keys with values; write {{{needed[0]}: …}}"
        return
    for key in needed:
        if key not in entry:
            yield f"{where}: lacks {key}; add it"
    for key in entry:
        if key not in (*needed, *others):
            close = difflib.get_close_matches(str(key), (*needed, *others), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"{where}.{key}: no such key; remove it{hint}"


def _dangling(where: str, name: Any, names: Any) -> str:
    return f"{where}={name}: must be one of {', '.join(map(str, names))}; choose one, or add it"
