"""The pins of pyproject.toml, the hashes beside them, the lock and the environment agree.

Mend them with `uv run scripts/dev/pin.py`, which CONTRIBUTING.md explains.
"""

import importlib.metadata
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
HASHES = ROOT / "requirements.lock.txt"
LOCK = ROOT / "uv.lock"


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins(pyproject) -> dict[str, str]:
    """Name -> version of `constraint-dependencies`."""
    return dict(pin.split("==") for pin in pyproject["tool"]["uv"]["constraint-dependencies"])


@pytest.fixture(scope="module")
def hashed() -> dict[tuple[str, str], set[str]]:
    """Name and version -> hashes of requirements.lock.txt."""
    text = HASHES.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {
        tuple(line.split()[0].split("==")): set(re.findall(r"--hash=(sha256:\w{64})(?!\w)", line))
        for line in lines
    }


@pytest.fixture(scope="module")
def locked() -> list[dict]:
    """Packages of uv.lock, without this one."""
    if not LOCK.exists():
        pytest.skip("no uv.lock: this environment was not made by uv, which writes it")
    return [p for p in tomllib.loads(LOCK.read_text())["package"] if "registry" in p["source"]]


def test_every_pin_is_exact(pyproject):
    tool = pyproject["tool"]["uv"]
    for pin in (*tool["constraint-dependencies"], *tool["build-constraint-dependencies"]):
        assert re.fullmatch(r"[a-z0-9-]+==[\w.!+]+", pin)


def test_hashes_stand_beside_the_same_versions(pins, hashed):
    assert set(hashed) == set(pins.items())
    assert all(hashed.values())


def test_build_backend_is_pinned(pyproject, pins):
    build = dict(p.split("==") for p in pyproject["tool"]["uv"]["build-constraint-dependencies"])
    required = [re.match(r"[\w-]+", r).group() for r in pyproject["build-system"]["requires"]]
    assert set(required) <= set(build)
    assert build["hatchling"] == pins["hatchling"]


def test_committed_files_name_no_registry(pyproject):
    assert "://" not in HASHES.read_text()
    assert "://" not in str(pyproject["tool"]["uv"])
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_lock_holds_the_pinned_versions_and_no_others(pins, locked):
    assert {p["name"]: p["version"] for p in locked} == pins


def test_files_that_this_machine_may_install_have_known_hashes(hashed, locked):
    """A registry may add files for other machines to a version; those for this one are checked."""
    tags = set(sys_tags())
    for package in locked:
        wheels = {w["hash"]: w["url"].rpartition("/")[2] for w in package.get("wheels", [])}
        fit = {h for h, name in wheels.items() if parse_wheel_filename(name)[3] & tags}
        files = fit or {package["sdist"]["hash"]} if fit or "sdist" in package else set()
        assert files <= hashed[package["name"], package["version"]], package["name"]


def test_environment_holds_the_pinned_versions(pins):
    home = Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ROOT / ".venv"))
    if Path(sys.prefix).resolve() != home.resolve():
        pytest.skip(f"{sys.prefix} is not the environment that uv made for this clone")
    installed = {
        canonicalize_name(dist.name): dist.version for dist in importlib.metadata.distributions()
    }
    common = set(installed) & set(pins)
    assert "jax" in common
    assert {name: installed[name] for name in common} == {name: pins[name] for name in common}
