"""Token stores: one zarr v3 group on disk, one 1-D array of token ids per split.

`<root>/train` and `<root>/val` hold the ids; the group's attributes say where they come from
(`tokenizer`, `vocab_size`, `bos_token_id`, `eos_token_id`, `source`). The published stores carry no
attributes.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from ttt.errors import UserError

CHUNK_TOKENS = 1 << 16
"""Tokens in a chunk on disk, 256 KiB before compression; a sample unpacks those it touches."""

MAKE_REMEDY = "Make one with `uv run --exact python scripts/04_make_token_data.py`."

PUBLISHED = {"dclm_filter_8k": "gs://llama3-dclm-filter-8k", "books3": "gs://llama3-books3"}
"""Buckets of the published stores; the reader pays."""

OnProgress = Callable[[int, int], None]
"""Called with the work done and all of it, in tokens or documents."""

_FINGERPRINT_SPANS = 16
_FINGERPRINT_SPAN_TOKENS = 1 << 16


class StoreError(UserError):
    """A token store that is absent, broken, unsuited, or in the way of a new one."""


def write(
    root: Path | str,
    splits: Mapping[str, np.ndarray | Iterable[np.ndarray]],
    *,
    attributes: Mapping[str, Any],
    files: Mapping[str, Path] | None = None,
) -> None:
    """Make a store of `splits`: name -> 1-D integers, or a stream of such arrays, little in memory.

    `attributes` must be JSON-able; ids stay below its `vocab_size`, if any. `files` (name in the
    store -> path) are copied in. The store is written beside `root` and renamed when it is whole.

    Raises `StoreError`, leaving nothing behind, at an id outside the vocabulary, or if `root`
    exists: before anything is written or, if another process was faster, at the end.
    """
    root = Path(root)
    refuse_existing(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f".{root.name}.{uuid.uuid4().hex}.partial")
    try:
        group = zarr.create_group(partial, attributes=dict(attributes))
        for name, source in (files or {}).items():
            shutil.copyfile(source, partial / name)
        for split, tokens in splits.items():
            parts = [tokens] if isinstance(tokens, np.ndarray) else tokens
            _write_split(group, split, parts, attributes.get("vocab_size", 1 << 31))
        try:
            partial.rename(root)
        except OSError:
            refuse_existing(root)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_split(
    group: zarr.Group, split: str, parts: Iterable[np.ndarray], vocab_size: int
) -> None:
    array = group.create_array(
        split,
        shape=(0,),
        chunks=(CHUNK_TOKENS,),
        dtype="int32",
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
        # A chunk of zeros is written too, so that an absent file always means damage.
        config={"write_empty_chunks": True},
    )
    pending = np.zeros(0, np.int32)  # less than a chunk
    for tokens in parts:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise StoreError(
                f"{split}: tokens are 1-D integers, not {tokens.dtype} {tokens.shape}."
            )
        if outside := ids_outside(tokens, vocab_size):
            raise StoreError(
                f"{split}: token id {outside[0]} is outside [0, {vocab_size}): "
                "check the tokenizer and vocab_size."
            )
        pending = np.concatenate([pending, tokens.astype(np.int32)])
        whole = pending.size - pending.size % CHUNK_TOKENS
        if whole:
            array.append(pending[:whole])
            pending = pending[whole:]
    if pending.size:
        array.append(pending)


def write_random(
    root: Path | str,
    lengths: Mapping[str, int],
    *,
    vocab_size: int,
    seed: int,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Make a store of uniform random ids of [0, vocab_size); `lengths`: split -> tokens, from 1."""
    rng = np.random.default_rng(seed)
    done, total = 0, sum(lengths.values())

    def ids(length: int) -> Iterator[np.ndarray]:
        nonlocal done
        for start in range(0, length, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, length - start)
            yield rng.integers(0, vocab_size, count, dtype=np.int32)
            done += count
            on_progress(done, total)

    attributes = {"source": f"uniform random ids, seed {seed}", "vocab_size": vocab_size}
    write(root, {split: ids(length) for split, length in lengths.items()}, attributes=attributes)


def refuse_existing(root: Path | str) -> None:
    """Raise `StoreError` if a store cannot be made at `root`; it is never overwritten."""
    root = Path(root)
    if root.exists():
        raise StoreError(
            f"{root} exists, and a token store is never overwritten: "
            "remove it or choose another destination."
        )
    place = next(parent for parent in root.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise StoreError(
            f"{root} cannot be made ({place} is no folder that you may write to): "
            "choose another destination."
        )


def open_split(root: Path | str, split: str, *, remedy: str = MAKE_REMEDY) -> zarr.Array:
    """Open `<root>/<split>`, a 1-D integer array, for reading.

    Raises `StoreError` if the store or the split is absent or unusable; `remedy`, the command that
    brings the data, ends the message where the data is absent or incomplete.
    """
    root = Path(root)
    present = _split_names(root, remedy)
    if split not in present:
        raise StoreError(f"{root} has no split {split!r}; it has {', '.join(present) or 'none'}.")
    # A chunk that vanishes later is an error too, where zarr knows the setting (3.2 or so on).
    with zarr.config.set({"array.read_missing_chunks": False}):
        array = zarr.open(root / split, mode="r")
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{root / split} is a zarr group; a split is a 1-D array of token ids.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise StoreError(
            f"{root / split} has shape {array.shape} and dtype {array.dtype}; "
            "a split is 1-D and of integers."
        )
    if array.nchunks_initialized < array.nchunks:
        # zarr reads an absent chunk as zeros without a word, and training would learn them.
        raise StoreError(
            f"{root / split} holds {array.nchunks_initialized} of its {array.nchunks} chunks, "
            f"as after an interrupted copy; complete it. {remedy}"
        )
    return array


def remedy(name: str, root: Path | str) -> str:
    """The command that brings the dataset `name` to `root`."""
    if name not in PUBLISHED:
        return MAKE_REMEDY
    where = "" if Path(root).name != name else f" --dest-root {Path(root).parent}"
    return (
        "Fetch it (the reader pays, through a Google Cloud project) with `uv run --exact python "
        f"scripts/00_data_fetch.py --datasets {name} --billing-project PROJECT{where}`, or set "
        f"deploy_paths.data.{name} to its folder."
    )


def read_attributes(root: Path | str, *, remedy: str = MAKE_REMEDY) -> dict[str, Any]:
    """The store's attributes, empty for the published ones; raises `StoreError` if there is none.

    The error's message ends with `remedy`.
    """
    _split_names(Path(root), remedy)
    return dict(zarr.open_group(root, mode="r").attrs)


def fingerprint(root: Path | str, split: str) -> str:
    """Hash shape, dtype and 16 evenly spaced spans of 65536 tokens: `sha256:` and 16 hex digits.

    The first and the last span are among them, and a split of up to 16 spans is hashed whole; so it
    reads a few MB of a store of any size. It does not depend on chunks or compression, and does not
    see a change outside the spans. Raises `StoreError`.
    """
    array = open_split(root, split)
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    last = max(0, array.shape[0] - _FINGERPRINT_SPAN_TOKENS)
    count = min(_FINGERPRINT_SPANS, -(-array.shape[0] // _FINGERPRINT_SPAN_TOKENS))
    for start in np.linspace(0, last, count, dtype=np.int64).tolist():
        stop = min(start + _FINGERPRINT_SPAN_TOKENS, array.shape[0])
        digest.update(read(array, start, stop, f"{root}/{split}").tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def read(tokens: zarr.Array | np.ndarray, start: int, stop: int, name: str) -> np.ndarray:
    """Read [start, stop) of a split; raises `StoreError`, which begins with `name`, at damage."""
    try:
        return np.asarray(tokens[start:stop])
    except Exception as error:  # of the disk, of zarr, or of any of its codecs
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StoreError(
            f"{name}: tokens {start} to {stop - 1} cannot be read ({cause}): a file is damaged or "
            "missing; restore the store from a good copy."
        ) from error


def ids_outside(tokens: np.ndarray, vocab_size: int) -> tuple[int, int] | None:
    """Return value and position of the first id outside [0, vocab_size), or None."""
    if not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return None
    position = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
    return int(tokens[position]), position


def _split_names(root: Path, remedy: str) -> list[str]:
    """Names of the arrays in the store at `root`; raises `StoreError` unless it is a zarr group."""
    if not root.is_dir():
        raise StoreError(f"No token store at {root.resolve()}. {remedy}")
    if not _is_group(root):
        inside = sorted(p.name for p in root.iterdir() if _is_group(p))
        hint = f"The group seems to be {root / inside[0]}." if inside else remedy
        raise StoreError(
            f"{root.resolve()} is no zarr v3 group: it has no zarr.json that says so. {hint}"
        )
    return sorted(p.name for p in root.iterdir() if (p / "zarr.json").is_file())


def _is_group(folder: Path) -> bool:
    try:
        return json.loads((folder / "zarr.json").read_text())["node_type"] == "group"
    except (OSError, ValueError, KeyError, TypeError):
        return False
