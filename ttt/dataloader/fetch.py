"""The published token stores from their buckets to a disk: fetched, resumed, verified, recorded.

A store's objects become files of the same names. Each is written as `.NAME.partial` beside its
place and renamed once its checksum is right; arrays come before the `zarr.json`s that make a store
of them. So an interrupted fetch is no store yet, and the same command goes on with it.
"""

import base64
import difflib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import google_crc32c

from ttt.dataloader import token_store
from ttt.dataloader.bucket import Bucket, Stored, UnreachableError
from ttt.dataloader.token_store import StoreError
from ttt.errors import RunError, UserError

RECORD = "fetch.json"
BLOCK_BYTES = 16 << 20
"""Bytes that one request asks for: what a broken connection costs, and each thread holds."""

_WAITS = (10.0, 30.0, 90.0)
"""Seconds before another try where gcsfs's own six have failed."""
_CHECKSUM_TRIES = 3
_TOLD = 5

Progress = Callable[[str, int, int | None, str], None]
"""Called with what is being done, how much of it, all of it if known, and the unit."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    dest_root: Path
    """A dataset lies in `dest_root/NAME`."""
    datasets: Sequence[str]
    splits: Sequence[str] = ("train", "val")
    billing_project: str | None = None
    source_root: str | None = None
    """`gs://BUCKET/PATH` that holds the datasets by name, in place of the published buckets."""
    endpoint_url: str | None = None
    threads: int = 16
    force: bool = False
    """Fetch anew what differs from the store."""

    def __post_init__(self):
        known = list(token_store.PUBLISHED)
        for name in self.datasets:
            if Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"--datasets: {name!r} is no name of a folder.")
            if name not in known and not self.source_root:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else "."
                raise UserError(f"--datasets: there is no {name!r}, only {', '.join(known)}{hint}")
        for flag, values in (("--datasets", self.datasets), ("--splits", self.splits)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{flag} {','.join(values)}: name one or more, each once.")
        if self.threads < 1:
            raise UserError(f"--threads {self.threads}: must be at least 1.")

    def source(self, name: str) -> str:
        """Where a dataset comes from; raises `UserError` if nobody is named to pay for it."""
        if self.source_root:
            return f"{self.source_root.rstrip('/')}/{name}"
        source = f"{token_store.PUBLISHED[name]}/data.zarr"
        if not self.billing_project:
            raise UserError(
                f"{source}: whoever reads this bucket pays for it, and no project to bill was "
                "named: give --billing-project PROJECT, a Google Cloud project of yours with "
                "billing switched on."
            )
        return source


@dataclass
class _Plan:
    """One dataset: what the store has, and what of it is on the disk."""

    name: str
    root: Path
    bucket: Bucket
    objects: list[Stored]
    absent: list[Stored] = field(default_factory=list)
    differing: list[Stored] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Files in the splits that the store does not have."""
    sums: dict[str, str] = field(default_factory=dict)
    """Name -> crc32c of the file on the disk, which is as the store's."""

    @property
    def missing_bytes(self) -> int:
        """What is still to come; a part that is there already counts."""
        parts = (_partial(self.root / stored.name) for stored in self.absent)
        here = sum(part.stat().st_size for part in parts if part.exists())
        wanted = sum(stored.size for stored in self.absent + self.differing)
        return max(0, wanted - here)


def fetch(
    request: Request,
    *,
    dry_run: bool = False,
    say: Say = lambda line: None,
    progress: Progress = lambda what, done, total, unit: None,
) -> None:
    """Bring the datasets to the disk, check them and write `fetch.json` into each.

    All are listed, and the room on the disk is compared, before the first is fetched; `dry_run`
    ends there. Raises `UserError` for what the user must set or decide, `RunError` for a failure
    under way; what has arrived stays, and the same call goes on with it.
    """
    sources = {name: request.source(name) for name in request.datasets}
    plans = [_plan(request, name, source, progress) for name, source in sources.items()]
    for plan in plans:
        say(_account(plan))
    if not request.force:
        _refuse_differing(plans)
    _check_room(request.dest_root, sum(plan.missing_bytes for plan in plans))
    for plan in () if dry_run else plans:
        with _only_one(plan.root), _hint():
            _transfer(plan, request.threads, progress)
            for line in _finish(plan, request.splits):
                say(line)


def check(
    request: Request,
    *,
    say: Say = lambda line: None,
    progress: Progress = lambda what, done, total, unit: None,
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
            plan = _plan(request, name, request.source(name), progress)
            say(_account(plan))
            faults += [f"{root / stored.name}: missing" for stored in plan.absent]
            faults += [f"{root / stored.name}: not as in the store" for stored in plan.differing]
        record = _read_record(root)
        if not record:
            say(f"{name}: not checked against an earlier fetch: {root / RECORD} is not there")
        if not record and not online:
            say(f"{name}: checksums not checked: that takes --billing-project PROJECT")
        for split in request.splits:
            said, wrong = _check_split(root, split, record, not online, progress)
            say(f"{name}/{split}: {said}")
            faults += [f"{root / split}: {fault}" for fault in wrong]
    if faults:
        raise RunError(
            f"{len(faults)} faults found:\n  {_few(faults)}\nThe same command with --force in "
            "place of --check-only, and a --billing-project, fetches anew what is wrong."
        )


def _plan(request: Request, name: str, source: str, progress: Progress) -> _Plan:
    """List the store, and compare the files that are there, checksums included."""
    bucket = Bucket(
        source, billing_project=request.billing_project, endpoint_url=request.endpoint_url
    )
    objects = bucket.objects(
        request.splits, lambda found: progress(f"listing {name}", found, None, "objects")
    )
    plan = _Plan(name, request.dest_root / name, bucket, objects)
    here = _files(plan.root, request.splits)
    plan.extra = sorted(set(here) - {stored.name for stored in objects} - {RECORD})
    plan.absent = [stored for stored in objects if stored.name not in here]
    present = [stored for stored in objects if stored.name in here]
    same_size = [stored for stored in present if here[stored.name] == stored.size]
    plan.differing = [stored for stored in present if here[stored.name] != stored.size]
    meter = _Meter(f"checking {name}", sum(stored.size for stored in same_size), progress)

    def compare(stored: Stored, stop: threading.Event) -> None:
        sums = _Sums(stored)
        sums.read(plan.root / stored.name, meter)
        if sums.right:
            plan.sums[stored.name] = sums.crc32c
        else:
            plan.differing.append(stored)

    _in_threads(compare, same_size, request.threads)
    return plan


def _account(plan: _Plan) -> str:
    size = sum(stored.size for stored in plan.objects)
    parts = [
        f"{plan.name}: {plan.bucket.source}: {len(plan.objects)} objects, {_bytes(size)}",
        f"{len(plan.sums)} are there, {len(plan.absent)} missing, {len(plan.differing)} differ",
        f"{_bytes(plan.missing_bytes)} to fetch",
    ]
    if plan.extra:
        parts.append(f"{len(plan.extra)} files that the store has not: {_few(plan.extra, ', ')}")
    if unsummed := sum(not (stored.crc32c or stored.md5) for stored in plan.objects):
        parts.append(f"{unsummed} have no checksum in the store: compared by size alone")
    return "; ".join(parts)


def _refuse_differing(plans: Iterable[_Plan]) -> None:
    paths = [str(plan.root / stored.name) for plan in plans for stored in plan.differing]
    if paths:
        raise UserError(
            f"{len(paths)} files differ from the store's:\n  {_few(paths)}\n"
            "Nothing is overwritten unasked: add --force to fetch them anew, or choose another "
            "--dest-root."
        )


def _check_room(dest_root: Path, needed: int) -> None:
    place = dest_root.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{dest_root}: {_bytes(needed)} are to be fetched, and the disk has {_bytes(free)} "
            "free: make room, or choose another --dest-root or fewer --datasets or --splits."
        )


@contextmanager
def _only_one(root: Path) -> Generator[None]:
    """Hold the folder, which is made, against a second fetch into it."""
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


def _transfer(plan: _Plan, threads: int, progress: Progress) -> None:
    """Fetch what is absent or differs, what makes a store of it last."""
    meter = _Meter(f"fetching {plan.name}", plan.missing_bytes, progress)
    wanted = plan.absent + plan.differing

    def get(stored: Stored, stop: threading.Event) -> None:
        plan.sums[stored.name] = _get(plan.bucket, stored, plan.root, stop, meter)

    for depth in (None, 1, 0):  # chunks; each split's zarr.json; the group's
        batch = [
            stored
            for stored in wanted
            if depth == (stored.name.count("/") if stored.name.endswith("zarr.json") else None)
        ]
        _in_threads(get, batch, threads)


@contextmanager
def _hint() -> Generator[None]:
    """Say at any bad end that nothing is lost."""
    hint = "What has arrived is kept; the same command goes on."
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. {hint}") from None
    except RunError as error:
        raise RunError(f"{error}\n{hint}") from error
    except OSError as error:
        full = " Make room." if error.errno == errno.ENOSPC else ""
        raise RunError(f"{error}.{full} {hint}") from error


def _get(bucket: Bucket, stored: Stored, root: Path, stop: threading.Event, meter: "_Meter") -> str:
    """Fetch one object and return its crc32c, empty if stopped; what is there of it is gone on."""
    target = root / stored.name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _partial(target)
    for _ in range(_CHECKSUM_TRIES):
        sums = _Sums(stored)
        if part.exists() and part.stat().st_size <= stored.size:
            sums.read(part)
        with part.open("r+b" if sums.size else "wb") as file:
            file.seek(sums.size)
            while sums.size < stored.size:
                if stop.is_set():
                    return ""
                end = min(stored.size, sums.size + BLOCK_BYTES)
                data = _read(bucket, stored, sums.size, end, stop)
                file.write(data)
                sums.add(data)
                meter.add(len(data))
        if sums.right:
            part.replace(target)
            return sums.crc32c
        part.unlink()
        meter.add(-stored.size)
    raise RunError(
        f"{bucket.source}/{stored.name} arrived {_CHECKSUM_TRIES} times with another checksum than "
        "the store's listing has: it is damaged there or on the way."
    )


def _read(bucket: Bucket, stored: Stored, start: int, end: int, stop: threading.Event) -> bytes:
    for wait in _WAITS:
        try:
            return bucket.read(stored, start, end)
        except UnreachableError:
            if stop.wait(wait):
                raise
    return bucket.read(stored, start, end)


def _finish(plan: _Plan, splits: Sequence[str]) -> list[str]:
    """Check the store, write the record and return what it is, a line per split."""
    before = _read_record(plan.root)
    told = {}
    for split in splits:
        try:
            array = token_store.open_split(plan.root, split)
        except StoreError as error:
            raise RunError(
                f"All is as in {plan.bucket.source}, which is broken: {error}"
            ) from error
        if not array.shape[0]:
            raise RunError(f"{plan.bucket.source}/{split} holds no tokens.")
        told[split] = {
            "tokens": array.shape[0],
            "dtype": str(array.dtype),
            "fingerprint": token_store.fingerprint(plan.root, split),
            **_summary(split, {stored.name: stored.size for stored in plan.objects}, plan.sums),
        }
    kept = before.get("splits", {}) if before.get("source") == plan.bucket.source else {}
    record = {
        "dataset": plan.name,
        "source": plan.bucket.source,
        "endpoint": plan.bucket.endpoint,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "splits": kept | told,
    }
    part = _partial(plan.root / RECORD)
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(plan.root / RECORD)
    return [
        f"{plan.root}/{split}: {of['tokens']} tokens of {of['dtype']}, {of['fingerprint']}"
        for split, of in told.items()
    ]


def _check_split(
    root: Path, split: str, record: Mapping[str, Any], sums: bool, progress: Progress
) -> tuple[str, list[str]]:
    """What a split is, in words, and what is wrong with it.

    sums: read all files and compare them with the record.
    """
    try:
        array = token_store.open_split(root, split)
        now = {
            "tokens": array.shape[0],
            "dtype": str(array.dtype),
            "fingerprint": token_store.fingerprint(root, split),
        }
    except StoreError as error:
        return "unusable", [str(error)]
    except Exception as error:  # of zarr or of any of its codecs, at a damaged chunk
        return "unreadable", [f"cannot be read ({type(error).__name__}: {error})"]
    said = f"{now['tokens']} tokens of {now['dtype']}, {now['fingerprint']}"
    faults = [] if now["tokens"] else ["holds no tokens"]
    if not record:
        return said, faults
    then = record["splits"].get(split)
    if then is None:
        return f"{said}; {RECORD} says nothing of it, so nothing was compared", faults
    if sums:
        files = _files(root, [split])
        files = {name: size for name, size in files.items() if name.startswith(f"{split}/")}
        meter = _Meter(f"checking {root.name}/{split}", sum(files.values()), progress)
        now |= _summary(split, files, {n: _crc32c(root / n, meter) for n in files})
    faults += [
        f"{key} is {value}, and was {then.get(key)} when it was fetched"
        for key, value in now.items()
        if then.get(key) != value
    ]
    return said, faults


def _summary(split: str, sizes: Mapping[str, int], sums: Mapping[str, str]) -> dict[str, Any]:
    """Count, bytes and one checksum of all files of a split."""
    names = sorted(name for name in sizes if name.startswith(f"{split}/"))
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {sizes[name]} {sums[name]}\n".encode())
    return {
        "objects": len(names),
        "bytes": sum(sizes[name] for name in names),
        "checksums": f"sha256:{digest.hexdigest()}",
    }


def _read_record(root: Path) -> dict[str, Any]:
    """What an earlier fetch wrote; empty where there was none, or it is no such record."""
    try:
        record = json.loads((root / RECORD).read_text())
        return record if isinstance(record["splits"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _files(root: Path, splits: Collection[str]) -> dict[str, int]:
    """Name below root -> bytes, of the root itself and the splits; no parts of files."""
    found = {}
    folders = [(root, False), *((root / split, True) for split in splits)]
    for top, deep in folders:
        for folder, inner, names in os.walk(top):
            if not deep:
                inner.clear()
            for name in names:
                path = Path(folder, name)
                if not (name.startswith(".") and name.endswith(".partial")):
                    found[path.relative_to(root).as_posix()] = path.stat().st_size
    return found


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


class _Sums:
    """The checksums of an object as its bytes come."""

    def __init__(self, stored: Stored):
        self._stored = stored
        self._crc = 0
        self._md5 = None if stored.crc32c or not stored.md5 else hashlib.md5(usedforsecurity=False)
        self.size = 0

    def add(self, data: bytes) -> None:
        self._crc = google_crc32c.extend(self._crc, data)
        if self._md5:
            self._md5.update(data)
        self.size += len(data)

    def read(self, path: Path, meter: "_Meter | None" = None) -> None:
        for data in _blocks(path):
            self.add(data)
            if meter:
                meter.add(len(data))

    @property
    def crc32c(self) -> str:
        crc = self._crc
        return base64.b64encode(crc.to_bytes(4, "big")).decode()

    @property
    def right(self) -> bool:
        """Whether size and checksum are those of the listing."""
        if self.size != self._stored.size:
            return False
        if md5 := self._md5:
            return base64.b64encode(md5.digest()).decode() == self._stored.md5
        return not self._stored.crc32c or self.crc32c == self._stored.crc32c


def _crc32c(path: Path, meter: "_Meter") -> str:
    sums = _Sums(Stored(path.name, 0, "", "", None))
    sums.read(path, meter)
    return sums.crc32c


def _blocks(path: Path) -> Generator[bytes]:
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            yield data


class _Meter:
    """Adds up what many threads have done, and tells."""

    def __init__(self, what: str, total: int, progress: Progress):
        self._what, self._total, self._progress = what, total, progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._what, self._done, self._total, "bytes")


def _in_threads(
    work: Callable[[Stored, threading.Event], None], items: Iterable[Stored], threads: int
) -> None:
    """Do `work` on each; the first failure, or Ctrl-C, sets the event and is raised.

    The threads are daemons: one that waits for a dead network does not hold up the end.
    """
    queue, lock, stop = iter(items), threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                work(item, stop)
            except BaseException as error:
                failures.append(error)
                stop.set()

    workers = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        while not failures and any(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.join(0.02)
    finally:
        stop.set()
    if failures:
        raise failures[0]


def _few(items: Sequence[str], between: str = "\n  ") -> str:
    more = [f"and {len(items) - _TOLD} more"] if len(items) > _TOLD else []
    return between.join([*items[:_TOLD], *more])


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
