"""The published token stores: fetched from their buckets, resumed, verified, recorded.

A store's objects become files of the same names. Each is written as `.NAME.partial` beside its
place and renamed once its checksum is right; arrays come before the `zarr.json`s that make a store
of them. So an interrupted fetch is no store yet, and the same command continues it.
"""

import base64
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import google_crc32c
from rich.filesize import decimal

from ttt.dataloader import token_store
from ttt.dataloader.bucket import (
    PAYER_MISSING,
    Bucket,
    StoredObject,
    UnreachableError,
    did_you_mean,
)
from ttt.dataloader.token_store import StoreError
from ttt.errors import RunError, UserError

RECORD = "fetch.json"
BLOCK_BYTES = 16 << 20
"""Bytes of one request: what a broken connection costs, and what each thread holds in memory."""

_WAITS = (10.0, 30.0, 90.0)
"""Seconds before another try where gcsfs's own six have failed."""
_CHECKSUM_TRIES = 3
_NAMES_SHOWN = 5

OnProgress = Callable[[str, int, int | None, str], None]
"""Called with the job, how much of it is done, all of it if known, and the unit."""
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """Which datasets, from where, to where."""

    dest_root: Path
    """A dataset is stored in `dest_root/NAME`."""
    datasets: Sequence[str]
    splits: Sequence[str] = ("train", "val")
    billing_project: str | None = None
    source_root: str | None = None
    """`gs://BUCKET/PATH` that holds the datasets by name, in place of the published buckets."""
    endpoint_url: str | None = None
    threads: int = 16
    force: bool = False
    """Fetch again what differs from the store."""

    def __post_init__(self):
        known = list(token_store.PUBLISHED)
        for name in self.datasets:
            if Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"--datasets: {name!r} is no name of a folder.")
            if name not in known and not self.source_root:
                raise UserError(
                    f"--datasets: there is no {name!r}, only {', '.join(known)}"
                    f"{did_you_mean(name, known)}"
                )
        for flag, values in (("--datasets", self.datasets), ("--splits", self.splits)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{flag} {','.join(values)}: name one or more, each once.")
        if self.threads < 1:
            raise UserError(f"--threads {self.threads}: must be at least 1.")

    def bucket(self, name: str) -> Bucket:
        """The store of a dataset; raises `UserError` if no project to bill is named."""
        if self.source_root:
            source = f"{self.source_root.rstrip('/')}/{name}"
        else:
            source = f"{token_store.PUBLISHED[name]}/data.zarr"
            if not self.billing_project:
                raise UserError(f"{source}: {PAYER_MISSING}")
        return Bucket(source, billing_project=self.billing_project, endpoint_url=self.endpoint_url)


@dataclass
class _Dataset:
    """One dataset: the objects of its store, and how the files on the disk compare with them."""

    name: str
    root: Path
    bucket: Bucket
    objects: list[StoredObject]
    absent: list[StoredObject]
    differing: list[StoredObject]
    extra: list[str]
    """Files in the splits that the store does not have."""
    crcs: dict[str, str]
    """Name -> crc32c of each file that is as in the store."""

    @property
    def bytes_to_fetch(self) -> int:
        """Without the parts of files that are on the disk already."""
        parts = (_partial(self.root / stored.name) for stored in self.absent)
        present = sum(part.stat().st_size for part in parts if part.exists())
        return max(0, _size(self.absent + self.differing) - present)


def fetch(
    request: Request,
    *,
    dry_run: bool = False,
    on_message: OnMessage = lambda line: None,
    on_progress: OnProgress = lambda job, done, total, unit: None,
) -> None:
    """Fetch the datasets, check them and write `fetch.json` into each.

    All are listed, and the free space on the disk is compared, before the first is fetched;
    `dry_run` ends there. Raises `UserError` for what the user must set or decide, `RunError` for a
    failure under way; what has arrived stays, and the same call continues.
    """
    buckets = {name: request.bucket(name) for name in request.datasets}
    datasets = [_compare(request, *item, on_progress) for item in buckets.items()]
    for dataset in datasets:
        on_message(_summary(dataset))
    if not request.force:
        _refuse_differing(datasets)
    _check_free_space(request.dest_root, sum(dataset.bytes_to_fetch for dataset in datasets))
    for dataset in () if dry_run else datasets:
        with _locked(dataset.root), _resume_hint():
            _transfer(dataset, request.threads, on_progress)
            for line in _write_record(dataset, request.splits):
                on_message(line)


def check(
    request: Request,
    *,
    on_message: OnMessage = lambda line: None,
    on_progress: OnProgress = lambda job, done, total, unit: None,
) -> None:
    """Check what is on the disk; nothing is fetched or changed.

    Each file is compared with the store's listing if a billing project, a source or an endpoint is
    given, and otherwise, without a network, with what `fetch.json` says of all files together.
    Raises `RunError` if anything is wrong, `UserError` if there is no store.
    """
    faults = []
    online = request.billing_project or request.source_root or request.endpoint_url
    for name in request.datasets:
        root = request.dest_root / name
        token_store.read_attributes(root, remedy=token_store.remedy(name, root))
        if online:
            dataset = _compare(request, name, request.bucket(name), on_progress)
            on_message(_summary(dataset))
            faults += [f"{root / stored.name}: missing" for stored in dataset.absent]
            faults += [f"{root / stored.name}: not as in the store" for stored in dataset.differing]
        record = _read_record(root)
        if not record:
            more = "" if online else "; checksums not checked: that takes --billing-project PROJECT"
            on_message(f"{name}: not compared with an earlier fetch: no {root / RECORD}{more}")
        for split in request.splits:
            text, wrong = _check_split(root, split, record, not online, on_progress)
            on_message(f"{name}/{split}: {text}")
            faults += [f"{root / split}: {fault}" for fault in wrong]
    if faults:
        raise RunError(
            f"{len(faults)} faults found:\n  {_few(faults)}\nThe same command with --force in "
            "place of --check-only, and a --billing-project, fetches what is wrong again."
        )


def _compare(request: Request, name: str, bucket: Bucket, on_progress: OnProgress) -> _Dataset:
    """List the store, and compare the files on the disk with it, checksums included."""
    root = request.dest_root / name
    objects = bucket.objects(
        request.splits, lambda count: on_progress(f"listing {name}", count, None, "objects")
    )
    sizes = _files(root, request.splits)
    present = [stored for stored in objects if stored.name in sizes]
    same_size = [stored for stored in present if sizes[stored.name] == stored.size]
    count = _counter(f"checking {name}", _size(same_size), on_progress)
    crcs = {}

    def compare(stored: StoredObject, stop: threading.Event) -> None:
        if crc := _verified(root / stored.name, stored, count):
            crcs[stored.name] = crc

    _in_threads(compare, same_size, request.threads)
    return _Dataset(
        name,
        root,
        bucket,
        objects,
        absent=[stored for stored in objects if stored.name not in sizes],
        differing=[stored for stored in present if stored.name not in crcs],
        extra=sorted(set(sizes) - {stored.name for stored in objects} - {RECORD}),
        crcs=crcs,
    )


def _summary(dataset: _Dataset) -> str:
    objects, extra = dataset.objects, dataset.extra
    text = (
        f"{dataset.name}: {dataset.bucket.source}: {len(objects)} objects, "
        f"{decimal(_size(objects))}; {len(dataset.crcs)} are on the disk, {len(dataset.absent)} "
        f"missing, {len(dataset.differing)} differ; {decimal(dataset.bytes_to_fetch)} to fetch"
    )
    if extra:
        text += f"; {len(extra)} files are not in the store: {_few(extra, ', ')}"
    if unlisted := sum(not (stored.crc32c or stored.md5) for stored in objects):
        text += f"; {unlisted} have no checksum in the store: compared by size alone"
    return text


def _refuse_differing(datasets: Iterable[_Dataset]) -> None:
    paths = [str(of.root / stored.name) for of in datasets for stored in of.differing]
    if paths:
        raise UserError(
            f"{len(paths)} files differ from the store's:\n  {_few(paths)}\n"
            "None was overwritten: add --force to fetch them again, or choose another --dest-root."
        )


def _check_free_space(dest_root: Path, needed: int) -> None:
    path = dest_root.absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{dest_root}: {decimal(needed)} are to be fetched, and the disk has {decimal(free)} "
            "free: free some space, or choose another --dest-root or fewer --datasets or --splits."
        )


@contextmanager
def _locked(root: Path) -> Generator[None]:
    """Make the folder, and lock it against a second fetch into it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{root} cannot be used ({error.strerror}): choose another --dest-root."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process fetches into {root}: wait for it, or end it."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _resume_hint() -> Generator[None]:
    """End the message of every failure with how to continue."""
    hint = "What has arrived is kept; the same command continues."
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. {hint}") from None
    except RunError as error:
        raise RunError(f"{error}\n{hint}") from error
    except OSError as error:
        remedy = " Free some space." if error.errno == errno.ENOSPC else ""
        raise RunError(f"{error}.{remedy} {hint}") from error


def _transfer(dataset: _Dataset, threads: int, on_progress: OnProgress) -> None:
    """Fetch what is absent or differs: chunks, then each split's zarr.json, then the group's."""
    count = _counter(f"fetching {dataset.name}", dataset.bytes_to_fetch, on_progress)

    def get(stored: StoredObject, stop: threading.Event) -> None:
        dataset.crcs[stored.name] = _get(dataset.bucket, stored, dataset.root, stop, count)

    def rank(stored: StoredObject) -> int:
        return max(0, 2 - stored.name.count("/")) if stored.name.endswith("zarr.json") else 0

    objects = sorted(dataset.absent + dataset.differing, key=rank)
    for _, batch in groupby(objects, key=rank):
        _in_threads(get, list(batch), threads)


def _get(
    bucket: Bucket,
    stored: StoredObject,
    root: Path,
    stop: threading.Event,
    count: Callable[[int], None],
) -> str:
    """Fetch one object, or what is missing of it; return its crc32c, empty if stopped."""
    target = root / stored.name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _partial(target)
    for _ in range(_CHECKSUM_TRIES):
        with part.open("ab") as file:
            if file.tell() > stored.size:  # of another version
                file.seek(0)
                file.truncate()
            for start in range(file.tell(), stored.size, BLOCK_BYTES):
                if stop.is_set():
                    return ""
                data = _read(bucket, stored, start, min(stored.size, start + BLOCK_BYTES), stop)
                file.write(data)
                count(len(data))
        if crc := _verified(part, stored, lambda done: None):
            part.replace(target)
            return crc
        part.unlink()
        count(-stored.size)
    raise RunError(
        f"{bucket.source}/{stored.name} arrived {_CHECKSUM_TRIES} times with another checksum than "
        "the store's listing has: it is damaged in the store or on the way."
    )


def _read(
    bucket: Bucket, stored: StoredObject, start: int, end: int, stop: threading.Event
) -> bytes:
    """Read a block. gcsfs's own tries take half a minute; an outage may last longer."""
    for wait in _WAITS:
        try:
            return bucket.read(stored, start, end)
        except UnreachableError:
            if stop.wait(wait):
                raise
    return bucket.read(stored, start, end)


def _write_record(dataset: _Dataset, splits: Sequence[str]) -> list[str]:
    """Open the store, write `fetch.json` and return a line per split."""
    source = dataset.bucket.source
    before = _read_record(dataset.root)
    sizes = {stored.name: stored.size for stored in dataset.objects}
    described = {}
    for split in splits:
        try:
            described[split] = _describe(dataset.root, split)
        except StoreError as error:
            raise RunError(f"All files are as in {source}, which is broken: {error}") from error
        if not described[split]["tokens"]:
            raise RunError(f"{source}/{split} holds no tokens.")
        described[split] |= _digest(split, sizes, dataset.crcs)
    kept = before.get("splits", {}) if before.get("source") == source else {}
    record = {
        "dataset": dataset.name,
        "source": source,
        "endpoint": dataset.bucket.endpoint,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "splits": kept | described,
    }
    part = _partial(dataset.root / RECORD)
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(dataset.root / RECORD)
    return [f"{dataset.root}/{split}: {_text(facts)}" for split, facts in described.items()]


def _check_split(
    root: Path, split: str, record: Mapping[str, Any], checksums: bool, on_progress: OnProgress
) -> tuple[str, list[str]]:
    """Describe a split in a line, and list what is wrong with it.

    checksums: read all files, and compare them with the record.
    """
    try:
        facts = _describe(root, split)
    except StoreError as error:
        return "unusable", [str(error)]
    text = _text(facts)
    faults = [] if facts["tokens"] else ["holds no tokens"]
    recorded = record.get("splits", {}).get(split)
    if recorded is None:
        return f"{text}; not in {RECORD}, so compared with nothing", faults
    if checksums:
        sizes = {n: s for n, s in _files(root, [split]).items() if n.startswith(f"{split}/")}
        count = _counter(f"checking {root.name}/{split}", sum(sizes.values()), on_progress)
        facts |= _digest(split, sizes, {name: _crc32c(root / name, count) for name in sizes})
    return text, faults + [
        f"{key} is {value}, and was {recorded.get(key)} when it was fetched"
        for key, value in facts.items()
        if recorded.get(key) != value
    ]


def _describe(root: Path, split: str) -> dict[str, Any]:
    array = token_store.open_split(root, split)
    return {
        "tokens": array.shape[0],
        "dtype": str(array.dtype),
        "fingerprint": token_store.fingerprint(root, split),
    }


def _text(facts: Mapping[str, Any]) -> str:
    return "{tokens} tokens of {dtype}, {fingerprint}".format_map(facts)


def _digest(split: str, sizes: Mapping[str, int], crcs: Mapping[str, str]) -> dict[str, Any]:
    """Count, bytes and one checksum of all files of a split."""
    names = sorted(name for name in sizes if name.startswith(f"{split}/"))
    lines = "".join(f"{name} {sizes[name]} {crcs[name]}\n" for name in names)
    return {
        "objects": len(names),
        "bytes": sum(sizes[name] for name in names),
        "checksums": f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}",
    }


def _read_record(root: Path) -> dict[str, Any]:
    """What an earlier fetch wrote; empty if there is no such file, or it is no such record."""
    try:
        record = json.loads((root / RECORD).read_text())
        return record if isinstance(record["splits"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _files(root: Path, splits: Iterable[str]) -> dict[str, int]:
    """Name relative to root -> bytes, of the root itself and the splits; no parts of files."""
    paths = [*root.glob("*"), *(path for split in splits for path in (root / split).rglob("*"))]
    return {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in paths
        if path.is_file() and not (path.name.startswith(".") and path.suffix == ".partial")
    }


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _verified(path: Path, stored: StoredObject, count: Callable[[int], None]) -> str:
    """A file's crc32c; empty if its size or checksum is not the listing's."""
    crc = _crc32c(path, count)
    same = not stored.crc32c or crc == stored.crc32c
    if stored.md5 and not stored.crc32c:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        same = base64.b64encode(md5.digest()).decode() == stored.md5
    return crc if same and path.stat().st_size == stored.size else ""


def _crc32c(path: Path, count: Callable[[int], None]) -> str:
    """The checksum in base64, as a listing has it; `count` gets the bytes read."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        for block in checksum.consume(file, 1 << 20):
            count(len(block))
    return base64.b64encode(checksum.digest()).decode()


def _size(objects: Iterable[StoredObject]) -> int:
    return sum(stored.size for stored in objects)


def _counter(job: str, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    """A function that adds up the bytes of many threads and reports them."""
    lock, done = threading.Lock(), 0

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            on_progress(job, done, total, "bytes")

    return count


def _in_threads(
    work: Callable[[StoredObject, threading.Event], None],
    items: Sequence[StoredObject],
    threads: int,
) -> None:
    """Do `work` on each; the first failure, or Ctrl-C, sets the event and is raised.

    The pool's threads are daemons: one that waits for a dead network does not delay the end.
    """
    stop = threading.Event()
    with ThreadPool(threads) as pool:
        try:
            for _ in pool.imap_unordered(lambda item: work(item, stop), items):
                pass
        finally:
            stop.set()


def _few(items: Sequence[str], separator: str = "\n  ") -> str:
    more = [f"and {len(items) - _NAMES_SHOWN} more"] if len(items) > _NAMES_SHOWN else []
    return separator.join([*items[:_NAMES_SHOWN], *more])
