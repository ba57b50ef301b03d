"""Whether a token store is fit to train on: what its splits hold, and what is wrong with it.

Samples of `seq_length` tokens are looked at, which begin at multiples of it as in training: all, or
some spread evenly. What no such sample shows (a damaged chunk elsewhere) is not seen.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from ttt.dataloader import token_store
from ttt.dataloader.token_store import StoreError
from ttt.errors import UserError

OnProgress = Callable[[str, int, int | None, str], None]
"""Called with the job, how much of it is done, all of it, and the unit."""

Verdict = Literal["ok", "warning", "fault", "not checked"]
Result = tuple[str, Verdict, str]
"""A check, its verdict and its message."""

RUN_WARNING, RUN_FAULT = 256, 1024
"""Equal tokens in a row. Text has lines of dashes and columns of zeros, hardly longer ones."""
FLAT_FAULT = 0.01
"""Share of samples that are one token throughout."""
COPY_FAULT = 0.01
"""Share of samples that are exact copies; of val, that are in train."""
REPEAT_WARNING, REPEAT_FAULT = 0.15, 0.5
"""Share of stretches of 64 tokens that occur again, at any place; licences and tables do."""
ENTROPY_WARNING, ENTROPY_FAULT = 1.0, 0.1
"""Nats per token of the frequencies alone; text has 3 as bytes, 7 in a vocabulary of 100,000."""
UNIFORM_SHARE = 0.995
"""Of ln(vocabulary): ids of more entropy are as good as uniform random ones."""
CERTAIN_BOS_TOKENS = 10_000_000
"""In so many tokens of whole documents one of them begins: few books have a million."""

_STRETCH = 64
_BLOCK_TOKENS = 1 << 20
_KEPT_STRETCHES = 1 << 20
_COUNTED_IDS = 1 << 22


@dataclass(frozen=True)
class Finding:
    """The result of one check of one split."""

    split: str
    check: str
    verdict: Verdict
    message: str


@dataclass
class Report:
    """The store and what was expected of it, all findings, and the numbers behind them by split."""

    path: str
    seq_length: int
    vocab_size: int | None
    bos_token_id: int | None
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def having(self, verdict: Verdict) -> list[Finding]:
        """The findings of one verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def add(self, split: str, *results: Result) -> None:
        """Add findings of a split, "" for the whole store."""
        self.findings += [Finding(split, *result) for result in results]


@dataclass
class _Seen:
    """What was read of one split."""

    samples: int
    """In the whole split."""
    keep_one_of: int
    """How sparsely stretches are kept; a power of 2."""
    looked_at: int = 0
    least_id: int = np.iinfo(np.int64).max
    most_id: int = np.iinfo(np.int64).min
    outside: list[tuple[int, int]] = field(default_factory=list)
    """Id and position of the first outside the vocabulary, of each block that has one."""
    unreadable: list[str] = field(default_factory=list)
    documents: int = 0
    samples_with_bos: int = 0
    longest_run: int = 0
    flat_samples: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(_COUNTED_IDS, np.int64))
    hashes: list[bytes] = field(default_factory=list)
    """Of each sample that is not one token throughout."""
    stretches: list[np.ndarray] = field(default_factory=list)
    """Hashes of stretches, of each block."""


def validate(
    root: Path | str,
    *,
    splits: Sequence[str] = ("train", "val"),
    seq_length: int = 8192,
    samples: int = 1000,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda job, done, total, unit: None,
) -> Report:
    """Check the splits of the store at `root`.

    samples: how many to look at in each split; 0: all.
    vocab_size, bos_token_id: the model's; None: those of the store's attributes.
    seed: which samples.
    Raises `UserError` for a request that makes no sense, `StoreError` if there is no store.
    """
    _check_request(splits, seq_length, samples, vocab_size, bos_token_id)
    stored = token_store.read_attributes(root, remedy=token_store.remedy(Path(root).name, root))
    bos = stored.get("bos_token_id") if bos_token_id is None else bos_token_id
    report = Report(str(root), seq_length, vocab_size or stored.get("vocab_size"), bos)
    report.add("", *_against_attributes(stored, vocab_size, bos_token_id))
    seen = {}
    for split in splits:
        try:
            array = token_store.open_split(root, split)
            fingerprint = token_store.fingerprint(root, split)
        except StoreError as error:
            report.add(split, ("opens", "fault", str(error)))
            continue
        tokens = array.shape[0]
        report.add(split, ("opens", "ok", f"{tokens:,} tokens of {array.dtype}, {fingerprint}"))
        job = partial(on_progress, f"looking at {split}")
        look = seen[split] = _read(report, array, samples, seed, job)
        numbers = {"tokens": tokens, "fingerprint": fingerprint, **_numbers(look, report)}
        report.numbers[split] = numbers
        report.add(split, *_contents(look, report, numbers), *_degenerate(look, report, numbers))
    if all(split in seen and seen[split].looked_at for split in ("train", "val")):
        report.add("val", _held_out(report, seen["train"], seen["val"]))
    return report


def preview(root: Path | str, splits: Sequence[str], seq_length: int, samples: int) -> list[str]:
    """Say what `validate` would look at, a line per split; no token is read. Raises as it does."""
    _check_request(splits, seq_length, samples)
    remedy = token_store.remedy(Path(root).name, root)
    lines = []
    for split in splits:
        array = token_store.open_split(root, split, remedy=remedy)
        total, chosen = _amounts(array, seq_length, samples)
        lines.append(
            f"{split}: would look at {chosen:,} of {total:,} samples of {seq_length} tokens"
        )
    return lines


def _check_request(
    splits: Sequence[str],
    seq_length: int,
    samples: int,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
) -> None:
    """Raise `UserError` for a request that makes no sense."""
    if not splits or len(set(splits)) < len(splits):
        raise UserError(f"--splits {','.join(splits)}: name one or more, each once.")
    for flag, value, least in (
        ("--seq-length", seq_length, 1),
        ("--samples", samples, 0),
        ("--vocab-size", vocab_size, 1),
        ("--bos-token-id", bos_token_id, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: must be at least {least}.")


def _against_attributes(
    stored: Mapping[str, Any], vocab_size: int | None, bos_token_id: int | None
) -> Iterator[Result]:
    """What contradicts the store's attributes; training refuses it for the same reasons."""
    made, begin = stored.get("vocab_size", 0), stored.get("bos_token_id", bos_token_id)
    if vocab_size and made > vocab_size:
        yield "vocabulary", "fault", f"made for {made} ids, more than --vocab-size {vocab_size}"
    if bos_token_id not in (None, begin):
        yield "BOS", "fault", f"its documents begin with id {begin}, not {bos_token_id}"


def _amounts(array: zarr.Array, seq_length: int, samples: int) -> tuple[int, int]:
    """How many samples a split has, and how many are to be read."""
    total = max(0, array.shape[0] - 1) // seq_length
    return total, min(samples or total, total)


def _read(
    report: Report,
    array: zarr.Array,
    samples: int,
    seed: int,
    on_progress: Callable[[int, int, str], None],
) -> _Seen:
    """Read so many samples, 0 for all, and count what they hold."""
    length, done = report.seq_length, 0
    total, chosen = _amounts(array, length, samples)
    sparsity = max(1, chosen * length / _KEPT_STRETCHES)
    seen = _Seen(total, keep_one_of=1 << math.ceil(math.log2(sparsity)))
    for first, count in _blocks(chosen, total, length, seed):
        start = first * length
        try:
            tokens = token_store.read(array, start, start + count * length + 1, report.path)
            _count(seen, report, tokens, start)
        except StoreError as error:
            seen.unreadable.append(str(error))
        done += count
        on_progress(done, chosen, "samples")
    return seen


def _blocks(chosen: int, total: int, seq_length: int, seed: int) -> Iterator[tuple[int, int]]:
    """First sample and number of samples to read at once: all in order, or one of each stratum."""
    if chosen == total:
        step = max(1, _BLOCK_TOKENS // seq_length)
        for first in range(0, total, step):
            yield first, min(step, total - first)
        return
    edges = np.linspace(0, total, chosen + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    for first in rng.integers(edges[:-1], edges[1:]).tolist():
        yield first, 1


def _count(seen: _Seen, report: Report, tokens: np.ndarray, start: int) -> None:
    """Add whole samples and the one token behind them; `start` is their place in the split."""
    seen.least_id = min(seen.least_id, int(tokens.min()))
    seen.most_id = max(seen.most_id, int(tokens.max()))
    bound = report.vocab_size or np.iinfo(np.int64).max
    if outside := token_store.ids_outside(tokens, bound):
        seen.outside.append((outside[0], start + outside[1]))
    tokens = tokens[:-1]
    rows = tokens.reshape(-1, report.seq_length)
    seen.looked_at += len(rows)
    countable = tokens[(tokens >= 0) & (tokens < _COUNTED_IDS)]
    np.add.at(seen.counts, countable.astype(np.int64), 1)
    if report.bos_token_id is not None:
        begins = rows == report.bos_token_id
        seen.documents += int(begins.sum())
        seen.samples_with_bos += int(begins.any(axis=1).sum())
    changes = np.flatnonzero(tokens[1:] != tokens[:-1])
    runs = np.diff(changes, prepend=-1, append=tokens.size - 1)
    seen.longest_run = max(seen.longest_run, int(runs.max()))
    flat = (rows == rows[:, :1]).all(axis=1) & (report.seq_length > 1)
    seen.flat_samples += int(flat.sum())
    seen.hashes += [blake2b(row.tobytes(), digest_size=16).digest() for row in rows[~flat]]
    seen.stretches.append(_stretches(tokens, seen.keep_one_of))


def _numbers(seen: _Seen, report: Report) -> dict[str, Any]:
    """What the checks compare, JSON-able; a number without tokens to take it from is left out."""
    if not seen.looked_at:
        return {"samples": seen.samples, "looked_at": 0}
    names = ("samples", "looked_at", "least_id", "most_id", "longest_run", "flat_samples")
    numbers = {name: getattr(seen, name) for name in names}
    if report.bos_token_id is not None:
        tokens = seen.looked_at * report.seq_length
        numbers |= {
            "documents": seen.documents,
            "documents_per_million_tokens": seen.documents / tokens * 1e6,
            "tokens_per_document": tokens / seen.documents if seen.documents else None,
            "samples_with_bos": seen.samples_with_bos / seen.looked_at,
        }
    numbers["copied_samples"] = len(seen.hashes) - len(set(seen.hashes))
    stretches = np.concatenate(seen.stretches)
    if stretches.size:
        numbers["repeated_stretches"] = 1 - np.unique(stretches).size / stretches.size
    if total := seen.counts.sum():
        shares = seen.counts[seen.counts > 0] / total
        numbers["unigram_entropy"] = float(-(shares * np.log(shares)).sum())
        numbers["different_ids"] = shares.size
    return numbers


def _contents(seen: _Seen, report: Report, numbers: Mapping[str, Any]) -> Iterator[Result]:
    """Check the number of samples, the ids and the beginnings of documents."""
    length = report.seq_length
    if not seen.samples:
        message = f"{numbers['tokens']} tokens, and one sample of {length} takes {length + 1}"
        yield "samples", "fault", f"{message}: lower --seq-length or add data"
    elif bad := seen.unreadable:
        yield "samples", "fault", f"{len(bad)} places cannot be read; the first: {bad[0]}"
    else:
        message = f"{seen.samples:,} of {length} tokens; looked at {seen.looked_at:,}"
        yield "samples", "ok", message
    if not seen.looked_at:
        return

    vocab_size, bos = report.vocab_size, report.bos_token_id
    message = f"{seen.least_id:,} to {seen.most_id:,}"
    if seen.outside:
        value, place = seen.outside[0]
        bound = f"[0, {vocab_size})" if vocab_size else "the ids, which begin at 0"
        yield "ids", "fault", f"{message}: id {value} at token {place:,} is outside {bound}"
    elif vocab_size:
        yield "ids", "ok", f"{message}, of {vocab_size:,}"
    else:
        message += "; neither the store nor --vocab-size says how many there may be"
        message += ": give --vocab-size (128256 for the published stores, of Llama 3's tokenizer)"
        yield "ids", "not checked", message

    tokens = seen.looked_at * length
    message = f"id {bos} is not among {tokens:,} tokens"
    if bos is None:
        message = "not checked: neither the store nor --bos-token-id says which id it is"
        yield "BOS", "warning", message
    elif seen.documents:
        message = (
            f"{numbers['documents_per_million_tokens']:,.1f} documents per million tokens, of "
            f"{numbers['tokens_per_document']:,.0f} each; {numbers['samples_with_bos']:.1%} of the "
            "samples hold the beginning of one"
        )
        yield "BOS", "ok", message
    elif seen.looked_at == seen.samples or tokens >= CERTAIN_BOS_TOKENS:
        message += ": documents are joined without a mark, or it is another tokenizer's id"
        yield "BOS", "fault", message
    else:
        yield "BOS", "warning", f"{message}: look at more (--samples 0 is all)"


def _degenerate(seen: _Seen, report: Report, numbers: Mapping[str, Any]) -> Iterator[Result]:
    """Check for long runs, copied samples, repeated stretches and odd frequencies."""
    if not seen.looked_at:
        return
    run, flat = seen.longest_run, seen.flat_samples / seen.looked_at
    message = f"{run:,} in a row at most; {seen.flat_samples:,} samples ({flat:.2%}) are one token"
    if run >= RUN_FAULT or flat >= FLAT_FAULT:
        yield "equal tokens", "fault", message
    else:
        yield "equal tokens", "warning" if run >= RUN_WARNING else "ok", message
    copies = numbers["copied_samples"]
    share = copies / seen.looked_at
    message = f"{copies:,} samples ({share:.2%}) are exact copies of another"
    yield "copies", _by_copies(share, report), message
    if "repeated_stretches" in numbers:
        share = numbers["repeated_stretches"]
        message = f"{share:.1%} of the stretches of {_STRETCH} tokens occur again"
        yield "repeats", _by_share(share, REPEAT_WARNING, REPEAT_FAULT), message
    else:
        message = f"no stretch of {_STRETCH} tokens that is not one token throughout"
        yield "repeats", "not checked", message

    if "unigram_entropy" not in numbers:
        yield "frequencies", "not checked", "no countable ids"
        return
    entropy = numbers["unigram_entropy"]
    message = f"{entropy:.2f} nats per token, {numbers['different_ids']:,} different ids"
    # With fewer tokens, chance alone makes the frequencies differ.
    vocab_size = report.vocab_size or 0
    enough = seen.counts.sum() >= 20 * vocab_size > 0
    if entropy < ENTROPY_FAULT:
        yield "frequencies", "fault", f"{message}: hardly anything but one token"
    elif entropy < ENTROPY_WARNING:
        yield "frequencies", "warning", f"{message}: far less than text has"
    elif enough and entropy > UNIFORM_SHARE * math.log(vocab_size):
        yield "frequencies", "warning", f"{message}: as of random ids, and nothing to learn"
    else:
        yield "frequencies", "ok", message


def _held_out(report: Report, train: _Seen, val: _Seen) -> Result:
    """Check how many of val's samples, and which share of its stretches, are in train too."""
    copies = set(train.hashes)
    samples = sum(sample in copies for sample in val.hashes)
    share = samples / val.looked_at
    own = np.concatenate(val.stretches)
    shared = np.isin(own[_kept(own, train.keep_one_of)], np.concatenate(train.stretches))
    stretches = float(shared.mean()) if shared.size else 0.0
    report.numbers["val"] |= {"samples_in_train": samples, "stretches_in_train": stretches}
    verdicts = _by_copies(share, report), _by_share(stretches, REPEAT_WARNING, REPEAT_FAULT)
    message = (
        f"{samples:,} samples ({share:.2%}) and {stretches:.1%} of the stretches of {_STRETCH} "
        "tokens are in train too"
    )
    return "held out", max(verdicts, key=("ok", "warning", "fault").index), message


def _by_copies(share: float, report: Report) -> Verdict:
    # Samples of few tokens are equal by chance.
    return _by_share(share, 0.0, max(COPY_FAULT, 5 / report.seq_length))


def _by_share(share: float, warning: float, fault: float) -> Verdict:
    if share >= fault:
        return "fault"
    return "warning" if share > warning else "ok"


def _stretches(tokens: np.ndarray, keep_one_of: int) -> np.ndarray:
    """Hashes of the runs of 64 tokens, at every place, that are not one token throughout.

    Which are kept depends on their content alone, so a copy elsewhere is kept too.
    """
    if tokens.size < _STRETCH:
        return np.zeros(0, np.uint64)
    mixed = _mix(tokens.astype(np.uint64))
    count = tokens.size - _STRETCH + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(_STRETCH):
        hashes = hashes * np.uint64(0x100000001B3) + mixed[offset : offset + count]
    hashes = _mix(hashes)
    changes = np.concatenate([[0], np.cumsum(tokens[1:] != tokens[:-1])])
    varied = changes[_STRETCH - 1 :] > changes[:count]
    return hashes[varied & _kept(hashes, keep_one_of)]


def _kept(hashes: np.ndarray, keep_one_of: int) -> np.ndarray:
    return hashes & np.uint64(keep_one_of - 1) == 0


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread the bits of uint64 (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
