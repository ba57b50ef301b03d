"""The corpus that is on every machine: Python source, with whole modules held out.

It holds the running Python's standard library and the packages that this project depends on, whose
versions are pinned. Left out are tests, files below 1 KB (licences, lists of imports) and above
400 KB (tables), files that are not UTF-8, and second copies of a file.
"""

import hashlib
import platform
import re
import sysconfig
from importlib import metadata
from pathlib import Path

from ttt.dataloader import text, token_store
from ttt.dataloader.text import Corpus
from ttt.dataloader.token_store import OnProgress
from ttt.errors import UserError

IMPORTED = "imported"
"""In place of a tokenizer's name: that of the model whose checkpoint is read or trained on."""
DATASETS = {"builtin": "bytes", "builtin_bpe": "bpe", "builtin_imported": IMPORTED}
"""Dataset name -> tokenizer, as `ttt.dataloader.text.tokenizer_for` takes it, or `IMPORTED`."""
HELD_OUT = {"dev": 0.05, "val": 0.1}
"""Shares of the modules: to choose settings by, and to report."""

_BYTES = range(1_000, 400_001)
_NOT_TEXT = {"test", "tests", "_tests", "idle_test", "site-packages", "dist-packages"}
_SHORTEST_LINE = 20


def corpus(*, seed: int = 0) -> Corpus:
    """Collect and divide the modules; the same on machines with the same versions.

    A held-out module of which more than half the lines (of 20 letters or more) are in training
    modules goes to training: it is a copy with small changes, and would measure memory.
    """
    ordered = sorted(_modules().items(), key=lambda item: _hash(f"{seed}:{item[0]}".encode()))
    contents: dict[Path, bytes] = {}
    seen: set[bytes] = set()
    for _, path in ordered:
        data = path.read_bytes()
        if len(data) in _BYTES and _hash(data) not in seen and _is_utf8(data):
            seen.add(_hash(data))
            contents[path] = data
    paths = list(contents)
    count = round(len(paths) * sum(HELD_OUT.values()))
    held_out, train = paths[:count], paths[count:]
    lines = {path: _long_lines(contents[path]) for path in held_out}
    asked = set().union(*lines.values())
    known: set[bytes] = set()
    for path in train:
        known |= asked.intersection(contents[path].split(b"\n"))
    copies = {path for path, own in lines.items() if 2 * len(own & known) > len(own)}
    held_out = [path for path in held_out if path not in copies]
    dev = round(len(held_out) * HELD_OUT["dev"] / sum(HELD_OUT.values()))
    splits = {
        "train": (*train, *(path for path in paths[:count] if path in copies)),
        "dev": tuple(held_out[:dev]),
        "val": tuple(held_out[dev:]),
    }
    source = (
        f"source of Python {platform.python_version()} and {len(_packages())} packages; seed "
        f"{seed}; {dev} (dev) and {len(held_out) - dev} (val) of {len(paths)} modules held out"
    )
    return Corpus(source, splits)


def ensure(
    name: str,
    root: Path | str,
    *,
    tokenizer_file: Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Make the built-in store `name` of `DATASETS` at `root` unless it exists: half a minute, once.

    Several processes may do so at once: each builds its own, and the first to finish stays.
    tokenizer_file: of the imported model, for the dataset that takes it; UserError without.
    """
    if Path(root).exists():
        return
    how = DATASETS[name]
    if how == IMPORTED:
        if tokenizer_file is None or not tokenizer_file.is_file():
            raise UserError(
                f"dataset {name}: it is cut into tokens as an imported model's text is, and no "
                "checkpoint with a tokenizer is named; start from one "
                "(training.load_part=params training.resume_exp_name=NAME), or choose another "
                "training.dataset_name"
            )
        how = str(tokenizer_file)
    try:
        modules = corpus()
        with text.tokenizer_for(how, modules) as tokenizer:
            text.write_corpus(root, modules, tokenizer, on_progress=on_progress)
    except token_store.StoreError:
        if not Path(root).exists():
            raise


def _modules() -> dict[str, Path]:
    """PACKAGE/PATH -> file."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = {
        f"python/{path.relative_to(library).as_posix()}": path for path in library.rglob("*.py")
    }
    for package in _packages():
        for file in metadata.files(package) or ():
            if file.suffix == ".py":
                modules[f"{package}/{file.as_posix()}"] = Path(str(file.locate()))
    return {name: path for name, path in modules.items() if not _NOT_TEXT & {*name.split("/")}}


def _packages() -> list[str]:
    """The packages that ttt needs, without extras."""
    needed = [text for text in metadata.requires("ttt") or () if "extra ==" not in text]
    names = {re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in needed}
    return sorted(re.sub(r"[-_.]+", "-", name).lower() for name in names)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _long_lines(data: bytes) -> set[bytes]:
    return {line for line in data.split(b"\n") if len(line.strip()) >= _SHORTEST_LINE}
