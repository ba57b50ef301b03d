"""Resolve all dependencies and write the pins and their hashes.

pin.py                        after a change of dependencies; what was pinned stays
pin.py --upgrade jax,jaxlib   the newest of these
pin.py --upgrade              the newest of everything

Writes `constraint-dependencies` and `build-constraint-dependencies` in pyproject.toml, and
requirements.lock.txt. Needs `uv` on the PATH and a package registry; Python 3.11 or later.
"""

import argparse
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT, LOCK, HASHES = (
    ROOT / name for name in ("pyproject.toml", "uv.lock", "requirements.lock.txt")
)
# What installing from a clone builds with, beyond `build-system.requires`: the editable install,
# and the one dependency that is published as source only (antlr4-python3-runtime).
ALSO_BUILDS_WITH = ("editables", "setuptools")
HEADER = """\
# Every package that a lock of this project may hold, direct or transitive, extras and dev group
# included, with the hashes of all its files. Written by scripts/dev/pin.py from uv.lock, because
# `uv export` has no form for extras that exclude each other. The versions stand in pyproject.toml.
"""


def uv(*arguments: str, stdin: str | None = None) -> str:
    """Run uv in the repository and return its output; where it fails, uv prints why."""
    done = subprocess.run(
        ["uv", *arguments], cwd=ROOT, input=stdin, text=True, stdout=subprocess.PIPE
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def with_list(pyproject: str, key: str, values: list[str]) -> str:
    """Replace a list of pyproject.toml, one value to a line."""
    lines = "".join(f'    "{value}",\n' for value in values)
    text, count = re.subn(
        rf"^{key} = \[.*?^\]$",
        lambda _: f"{key} = [\n{lines}]",
        pyproject,
        flags=re.DOTALL | re.MULTILINE,
    )
    if count != 1:
        raise SystemExit(f"pyproject.toml holds `{key} = [` {count} times, not once")
    return text


def locked() -> list[dict]:
    """The packages of uv.lock by name, without the project itself."""
    packages = [p for p in tomllib.loads(LOCK.read_text())["package"] if "registry" in p["source"]]
    versions = Counter(package["name"] for package in packages)
    if twice := [name for name, count in versions.items() if count > 1]:
        raise SystemExit(f"resolved to several versions, which no single pin can hold: {twice}")
    return sorted(packages, key=lambda package: package["name"])


def hash_block(package: dict) -> str:
    """One pin of requirements.lock.txt, with the hashes of all its files."""
    files = [*package.get("wheels", []), *filter(None, [package.get("sdist")])]
    options = sorted(f"--hash={file['hash']}" for file in files)
    return " \\\n    ".join([f"{package['name']}=={package['version']}", *options]) + "\n"


def resolve(pyproject: str, kept: list[str]) -> list[dict]:
    """Lock afresh with what is kept, write the pins of pyproject.toml, and return the packages."""
    PYPROJECT.write_text(with_list(pyproject, "constraint-dependencies", kept))
    LOCK.unlink(missing_ok=True)  # it would keep its list of files where a registry has added some
    uv("lock")
    packages = locked()
    pins = [f"{package['name']}=={package['version']}" for package in packages]
    pyproject = with_list(pyproject, "constraint-dependencies", pins)
    PYPROJECT.write_text(pyproject)
    requirements = [*tomllib.loads(pyproject)["build-system"]["requires"], *ALSO_BUILDS_WITH]
    options = ["--universal", "--python-version", "3.12", "--no-header", "--no-annotate", "--quiet"]
    build = uv("pip", "compile", "-", *options, stdin="\n".join(requirements)).splitlines()
    PYPROJECT.write_text(with_list(pyproject, "build-constraint-dependencies", build))
    uv("lock")
    return packages


def main() -> None:
    """Resolve and write; on failure pyproject.toml stays as it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", nargs="?", const="all", metavar="NAME,…")
    upgrade = parser.parse_args().upgrade

    before = PYPROJECT.read_text()
    old = tomllib.loads(before)["tool"]["uv"]["constraint-dependencies"]
    names = {pin.split("==")[0] for pin in old}
    freed = names if upgrade == "all" else set(upgrade.split(",")) if upgrade else set()
    if unknown := freed - names:
        parser.error(f"not among the pins: {', '.join(sorted(unknown))}")
    try:
        packages = resolve(before, [pin for pin in old if pin.split("==")[0] not in freed])
    except BaseException:
        PYPROJECT.write_text(before)
        raise
    HASHES.write_text(HEADER + "".join(map(hash_block, packages)))


if __name__ == "__main__":
    main()
