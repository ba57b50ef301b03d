"""The house (docs/design.md), read off the import statements."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttt.mixers import HYBRID, MIXERS

ROOT = Path(__file__).parents[1]

# From the ground up. A module may be named before it is written; none may be written unnamed.
FLOORS = (
    (
        *("ttt.errors", "ttt.globs", "ttt.mixers", "ttt.knobs", "ttt.config", "ttt.entry"),
        *("ttt.experiment_rules", "ttt.figures", "ttt.intervals"),
    ),
    ("ttt.core", "hydra_plugins"),
    ("ttt.ops", "ttt.optimizers", "ttt.dataloader", "ttt.infra"),
    ("ttt.plan",),
    ("ttt.model",),
    ("ttt.training", "ttt.inference", "ttt.interop"),
    ("ttt.evaluation", "ttt.bench"),
    ("ttt.runs", "ttt.report"),
    ("ttt.train", "ttt.evaluate", "ttt.generate", "ttt.benchmark"),
    ("ttt.language_model",),
    ("ttt",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

JAX_FREE = (
    "ttt.knobs",
    "ttt.mixers",
    "ttt.experiment_rules",
    "ttt.config",
    "ttt.errors",
    "ttt.globs",
    "ttt.entry",
    "ttt.infra.record",
    "ttt.infra.plan_manifest",
    "ttt.infra.progress",
    "ttt.dataloader.token_store",
    "ttt.dataloader.text",
    "ttt.dataloader.make_store",
    "ttt.dataloader.bucket",
    "ttt.dataloader.fetch",
    "ttt.dataloader.validate",
    "ttt.plan.sharding",
    "ttt.training.count_model",
    "ttt.plan.parameters",
    "ttt.plan.flops",
    "ttt.plan.memory",
    "ttt.plan.memory_plan",
    "ttt.evaluation.result",
    "ttt.figures",
    "ttt.intervals",
    "ttt.evaluation.repetition",
    "ttt.interop.catalog",
    "ttt.interop.reference",
    "ttt.runs.external",
    "ttt.evaluation.ruler",
    "ttt.report.frame",
    "ttt.report.compare",
    "ttt.report.verdict",
    "ttt.report.curves",
    "ttt.report.pictures",
    "ttt.report.tables",
    "ttt.report.inspection",
    "ttt.report.phase1",
    "ttt.runs.registry",
    "ttt.runs.execute",
)


DOCUMENTED = ("os._exit",)
"""Public all the same: the name says that it is to be used with care."""


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    _module_name(path): path
    for package in ("ttt", "hydra_plugins")
    for path in sorted((ROOT / package).rglob("*.py"))
}
SCRIPTS = sorted((ROOT / "scripts").glob("[0-9]*.py"))


def room(module: str) -> str:
    """The entry of FLOORS that holds a module: `ttt.ops.rotary` -> `ttt.ops`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ttt" else parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` -> `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of this repository among the imports."""
    names = {name for name in imports(tree) if name.split(".")[0] in ("ttt", "hydra_plugins")}
    return {name if name in SOURCES else name.rpartition(".")[0] for name in names} & set(SOURCES)


def upward(module: str, tree: ast.AST) -> list[str]:
    """Imports that reach another room of the same floor, or a higher floor.

    The ground floor's rooms are single modules and see each other.
    """
    here = FLOOR[room(module)]
    return [
        name
        for name in sorted(own_imports(tree))
        if room(name) != room(module) and FLOOR[room(name)] >= max(here, 1)
    ]


def private(tree: ast.AST) -> list[str]:
    """What a file takes from behind an underscore: imported, or as an attribute of an import."""
    bound = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    used = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in bound
    ]
    names = [name for name in [*imports(tree), *used] if name not in DOCUMENTED]
    return [name for name in names if re.search(r"(^|\.)_(?!_)", name)]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@pytest.mark.parametrize("module", SOURCES)
def test_module_has_a_floor(module):
    assert room(module) in FLOOR, f"{room(module)}: give it a floor, here and in docs/design.md"


def test_design_page_has_every_room_on_its_floor():
    page = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| *(\d) *\| *(.*?) *\|", page, flags=re.MULTILINE)
    told = {name: int(floor) for floor, names in rows for name in re.findall(r"`(.+?)`", names)}
    assert told == {room: floor for room, floor in FLOOR.items() if room != "ttt"}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_only(module):
    assert upward(module, parsed(SOURCES[module])) == []


def test_no_module_imports_itself_by_a_circle():
    graph = {module: own_imports(parsed(path)) for module, path in SOURCES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("module", "line", "faults"),
    [
        ("ttt.ops.rotary", "import ttt.config", []),
        ("ttt.ops.rotary", "from ttt.ops import cross_entropy", []),
        ("ttt.ops.rotary", "from ttt.model import layers", ["ttt.model.layers"]),
        ("ttt.ops.rotary", "def f():\n    import ttt.infra.mesh", ["ttt.infra.mesh"]),
        ("ttt.core.tree", "from ttt.ops.rotary import rotate", ["ttt.ops.rotary"]),
        ("ttt.errors", "from ttt.core.batch import Batch", ["ttt.core.batch"]),
        ("ttt.entry", "from ttt.errors import UserError", []),
    ],
)
def test_upward_import_is_seen(monkeypatch, module, line, faults):
    for name in (*faults, "ttt.config", "ttt.ops.cross_entropy"):
        monkeypatch.setitem(SOURCES, name, Path())
    assert upward(module, ast.parse(line)) == faults


@pytest.mark.parametrize(
    "path", [*SOURCES.values(), *SCRIPTS], ids=[*SOURCES, *(path.stem for path in SCRIPTS)]
)
def test_nothing_private_is_borrowed(path):
    assert private(parsed(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import jax._src.core",
        "from optax._src import base",
        "from a import _b",
        "import jax; jax._x",
    ],
)
def test_private_import_is_seen(line):
    assert private(ast.parse(line))


@pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES)
def test_package_neither_prints_nor_asserts(path):
    faults = [
        node.lineno
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Name) and node.id == "print")
    ]
    assert faults == [], f"lines {faults} of {path}: raise an error, or use the run's progress"


@pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES)
def test_package_imports_by_full_name(path):
    assert [name for name in imports(parsed(path)) if name.startswith(".")] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script_is_an_address_not_a_house(path):
    assert len(path.read_text().splitlines()) <= 80
    assert any(name.startswith("ttt.") for name in imports(parsed(path)))


MIXER_NAMES = {name for kind in MIXERS.values() for name in (kind.name, kind.short, kind.label)} | {
    HYBRID
}


def mixers_compared(tree: ast.AST) -> list[str]:
    """Comparisons, and cases of `match`, with the name of a mixer or of a network of one."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.MatchValue)]
    return [
        ast.unparse(node)
        for node in tests
        if any(
            isinstance(part, ast.Constant) and part.value in MIXER_NAMES for part in ast.walk(node)
        )
    ]


@pytest.mark.parametrize("path", [*SOURCES.values(), *SCRIPTS], ids=str)
def test_nobody_but_the_descriptions_compares_a_mixers_name(path):
    if path != SOURCES["ttt.mixers"]:
        assert mixers_compared(parsed(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "x == 'SWA'",
        "'full_attention' != x",
        "x in ('fa', 'swa')",
        "[k for k in x if k not in {'hybrid'}]",
        "match x:\n    case 'self_attention':\n        pass",
        "match x:\n    case 'a' | 'sliding_attention':\n        pass",
    ],
)
def test_a_comparison_with_a_mixers_name_is_seen(line):
    assert len(mixers_compared(ast.parse(line))) == 1
    assert mixers_compared(ast.parse(re.sub("'[^']+'", "'e2e'", line))) == []


def test_training_does_not_wait_for_pandas():
    reached, left = set(), {"ttt.train"}
    while left:
        module = left.pop()
        reached.add(module)
        left |= own_imports(parsed(SOURCES[module])) - reached
    assert "ttt.infra.record" in reached
    users = {m for m in SOURCES if "pandas" in {*imports(parsed(SOURCES[m]))}}
    assert "ttt.report.frame" in users
    assert not users & reached


def test_light_modules_do_not_wake_jax():
    there = [name for name in JAX_FREE if name in SOURCES]
    assert "ttt.config" in there
    code = (
        "import importlib, sys\n"
        f"for name in {there}:\n"
        "    importlib.import_module(name)\n"
        "    if 'jax' in sys.modules: sys.exit(f'{name} imports JAX')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
