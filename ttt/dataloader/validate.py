"""Whether a token store is fit to train on: what its splits hold, and what is wrong with it.

Looked at are samples of `seq_length` tokens, which begin at multiples of it as in training: all of
them, or some drawn evenly. What a sample cannot show (a damaged chunk elsewhere) is not seen.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from ttt.dataloader import token_store
from ttt.dataloader.token_store import StoreError
from ttt.errors import UserError

Progress = Callable[[str, int, int | None, str], None]
"""Called with what is being done, how much of it, all of it, and the unit."""

Verdict = Literal["ok", "warning", "fault", "not checked"]

LLAMA_3 = "128256 for the published stores, which are tokenized for Llama 3"

RUN_WARNING, RUN_FAULT = 256, 1024
"""Equal tokens in a row. Text has lines of dashes and columns of zeros, hardly longer ones."""
FLAT_FAULT = 0.01
"""Share of samples that are one token all through."""
COPY_FAULT = 0.01
"""Share of samples that are exact copies; of val, that stand in train."""
REPEAT_WARNING, REPEAT_FAULT = 0.15, 0.5
"""Share of stretches of 64 tokens that occur again, at any place; licences and tables do."""
ENTROPY_WARNING, ENTROPY_FAULT = 1.0, 0.1
"""Nats per token of the frequencies alone; text has 3 as bytes, 7 in a vocabulary of 100,000."""
UNIFORM_SHARE = 0.995
"""Of ln(vocabulary): nearer to it the ids are as good as drawn by lot."""
SURELY_BOS_TOKENS = 10_000_000
"""In so many tokens of whole documents one of them begins: few books have a million."""

_STRETCH = 64
_BLOCK_TOKENS = 1 << 20
_KEPT_STRETCHES = 1 << 20
_COUNTED_IDS = 1 << 22


@dataclass(frozen=True)
class Finding:
    """What one check says of one split."""

    split: str
    check: str
    verdict: Verdict
    said: str


@dataclass(frozen=True)
class Report:
    """All findings, and the numbers behind them by split."""

    path: str
    seq_length: int
    vocab_size: int | None
    bos_token_id: int | None
    findings: tuple[Finding, ...]
    numbers: Mapping[str, Mapping[str, Any]]

    def having(self, verdict: Verdict) -> list[Finding]:
        """The findings of one verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)


def validate(
    root: Path | str,
    *,
    splits: Sequence[str] = ("train", "val"),
    seq_length: int = 8192,
    samples: int = 1000,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total, unit: None,
) -> Report:
    """Check the splits of the store at `root`.

    samples: how many to look at in each split; 0: all.
    vocab_size, bos_token_id: the model's; None: what the store says of itself.
    seed: which samples.
    Raises `UserError` for a request that makes no sense, `StoreError` if there is no store.
    """
    _check_request(splits, seq_length, samples, vocab_size, bos_token_id)
    stored = token_store.read_attributes(root, remedy=token_store.remedy(Path(root).name, root))
    findings = _against_attributes(stored, vocab_size, bos_token_id)
    vocab_size = vocab_size or stored.get("vocab_size")
    bos_token_id = stored.get("bos_token_id") if bos_token_id is None else bos_token_id
    looks: dict[str, _Look] = {}
    for split in splits:
        try:
            array = token_store.open_split(root, split)
            print_ = token_store.fingerprint(root, split)
        except StoreError as error:
            findings.append(Finding(split, "opens", "fault", str(error)))
            continue
        except Exception as error:  # of zarr or of any of its codecs, at a damaged chunk
            findings.append(Finding(split, "opens", "fault", f"cannot be read: {_cause(error)}"))
            continue
        look = _Look(split, array, seq_length, vocab_size, bos_token_id)
        opened = f"{array.shape[0]:,} tokens of {array.dtype}, {print_}"
        findings.append(Finding(split, "opens", "ok", opened))
        look.numbers["fingerprint"] = print_
        look.read(samples, seed, progress)
        findings += look.findings()
        looks[split] = look
    if "train" in looks and "val" in looks:
        findings += _overlap(looks["train"], looks["val"])
    numbers = {split: look.numbers for split, look in looks.items()}
    return Report(str(root), seq_length, vocab_size, bos_token_id, tuple(findings), numbers)


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
    bounds = {"seq-length": (seq_length, 1), "samples": (samples, 0)}
    given = {"vocab-size": (vocab_size, 1), "bos-token-id": (bos_token_id, 0)}
    for flag, (value, least) in (bounds | given).items():
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}.")


def plan(root: Path | str, splits: Sequence[str], seq_length: int, samples: int) -> list[str]:
    """Say what `validate` would look at, a line per split; no token is read. Raises as it does."""
    _check_request(splits, seq_length, samples)
    remedy = token_store.remedy(Path(root).name, root)
    lines = []
    for split in splits:
        tokens = token_store.open_split(root, split, remedy=remedy).shape[0]
        total = max(0, tokens - 1) // seq_length
        wanted = min(samples, total) if samples else total
        lines.append(
            f"{split}: would look at {wanted:,} of {total:,} samples of {seq_length} tokens"
        )
    return lines


def _against_attributes(
    stored: Mapping[str, Any], vocab_size: int | None, bos_token_id: int | None
) -> list[Finding]:
    """What contradicts the store's own account; training refuses it for the same reasons."""
    found = []
    if vocab_size and stored.get("vocab_size", 0) > vocab_size:
        said = f"made with vocab_size={stored['vocab_size']}, more than the {vocab_size} asked for"
        found.append(Finding("", "vocabulary", "fault", said))
    if bos_token_id not in (None, stored.get("bos_token_id", bos_token_id)):
        said = f"its documents begin with id {stored['bos_token_id']}, not {bos_token_id}"
        found.append(Finding("", "BOS", "fault", said))
    return found


class _Look:
    """What was seen of one split."""

    def __init__(
        self,
        split: str,
        array: zarr.Array,
        seq_length: int,
        vocab_size: int | None,
        bos_token_id: int | None,
    ):
        self.split, self._array, self._seq_length = split, array, seq_length
        self._vocab_size, self._bos = vocab_size, bos_token_id
        self.there = max(0, array.shape[0] - 1) // seq_length
        self.seen = 0
        self.numbers: dict[str, Any] = {"tokens": array.shape[0], "samples": self.there}
        self._counts = np.zeros(0, np.int64)
        self._outside: list[tuple[int, int]] = []
        self._unreadable: list[str] = []
        self._flat = self._with_bos = self._documents = self._longest_run = 0
        self._least, self._most = math.inf, -math.inf
        self.copies: list[bytes] = []
        """A hash of each sample that is not one token all through."""
        self._stretches: list[np.ndarray] = []
        self._keep_one_of = 1

    def read(self, samples: int, seed: int, progress: Progress) -> None:
        """Look at so many samples, 0: at all."""
        wanted = min(samples, self.there) if samples else self.there
        while wanted * self._seq_length / self._keep_one_of > _KEPT_STRETCHES:
            self._keep_one_of *= 2
        done = 0
        for first, count in _runs_of_samples(wanted, self.there, self._seq_length, seed):
            start = first * self._seq_length
            try:
                tokens = np.asarray(self._array[start : start + count * self._seq_length + 1])
            except Exception as error:  # of the disk, of zarr, or of any of its codecs
                self._unreadable.append(f"tokens {start:,} and on: {_cause(error)}")
            else:
                self._take(tokens, start)
            done += count
            progress(f"looking at {self.split}", done, wanted, "samples")

    def _take(self, tokens: np.ndarray, start: int) -> None:
        self._least = min(self._least, int(tokens.min()))
        self._most = max(self._most, int(tokens.max()))
        bound = self._vocab_size or np.iinfo(np.int64).max
        if outside := token_store.ids_outside(tokens, bound):
            self._outside.append((outside[0], start + outside[1]))
        body = tokens[:-1]
        rows = body.reshape(-1, self._seq_length)
        self.seen += len(rows)
        countable = body[(body >= 0) & (body < _COUNTED_IDS)].astype(np.int64)
        counts = np.bincount(countable, minlength=self._counts.size)
        counts[: self._counts.size] += self._counts
        self._counts = counts
        if self._bos is not None:
            begins = rows == self._bos
            self._documents += int(begins.sum())
            self._with_bos += int(begins.any(axis=1).sum())
        self._longest_run = max(self._longest_run, _longest_run(body))
        flat = (
            (rows == rows[:, :1]).all(axis=1) if self._seq_length > 1 else np.zeros(len(rows), bool)
        )
        self._flat += int(flat.sum())
        self.copies += [_hash(row) for row in rows[~flat]]
        self._stretches.append(_stretches(body, self._keep_one_of))

    def findings(self) -> list[Finding]:
        """What the checks say, and the numbers."""
        if not self.there:
            said = (
                f"{self._array.shape[0]} tokens, and one sample of {self._seq_length} takes "
                f"{self._seq_length + 1}: lower --seq-length or add data"
            )
            return [Finding(self.split, "samples", "fault", said)]
        said = f"{self.there:,} of {self._seq_length} tokens; looked at {self.seen:,}"
        verdicts: dict[str, tuple[Verdict, str]] = {"samples": ("ok", said)}
        if self._unreadable:
            said = f"{len(self._unreadable)} cannot be read, the first: {self._unreadable[0]}"
            verdicts["samples"] = ("fault", said)
        if self.seen:
            verdicts |= {
                "ids": self._ids(),
                "BOS": self._bos_frequency(),
                "equal tokens": self._equal(),
                "copies": self._copies(),
                "repeats": self._repeats(),
                "frequencies": self._entropy(),
            }
        self.numbers["looked_at"] = self.seen
        return [Finding(self.split, check, *verdict) for check, verdict in verdicts.items()]

    def _ids(self) -> tuple[Verdict, str]:
        self.numbers |= {"least_id": int(self._least), "most_id": int(self._most)}
        said = f"{self._least:,} to {self._most:,}"
        if self._outside:
            value, place = self._outside[0]
            bound = f"[0, {self._vocab_size})" if self._vocab_size else "the ids, which begin at 0"
            return "fault", f"{said}: id {value} at token {place:,} is outside {bound}"
        if not self._vocab_size:
            return (
                "not checked",
                f"{said}; neither the store nor --vocab-size says how many there may be: give "
                f"--vocab-size ({LLAMA_3})",
            )
        return "ok", f"{said}, of {self._vocab_size:,}"

    def _bos_frequency(self) -> tuple[Verdict, str]:
        if self._bos is None:
            return (
                "warning",
                "not checked: neither the store nor --bos-token-id says which id it is",
            )
        tokens = self.seen * self._seq_length
        self.numbers |= {
            "documents": self._documents,
            "documents_per_million_tokens": self._documents / tokens * 1e6,
            "tokens_per_document": tokens / self._documents if self._documents else None,
            "samples_with_bos": self._with_bos / self.seen,
        }
        if self._documents:
            return (
                "ok",
                f"{self._documents / tokens * 1e6:,.1f} documents per million tokens, of "
                f"{tokens / self._documents:,.0f} each; {self._with_bos / self.seen:.1%} of the "
                "samples hold one's beginning",
            )
        said = f"id {self._bos} is not among {tokens:,} tokens"
        if self.seen == self.there or tokens >= SURELY_BOS_TOKENS:
            return (
                "fault",
                f"{said}: documents run into each other unmarked, or it is another tokenizer's id",
            )
        return "warning", f"{said}: look at more (--samples 0 is all)"

    def _equal(self) -> tuple[Verdict, str]:
        share = self._flat / self.seen
        self.numbers |= {"longest_run": self._longest_run, "flat_samples": self._flat}
        said = (
            f"at most {self._longest_run:,} in a row; {self._flat:,} samples ({share:.2%}) are one "
            "token all through"
        )
        if self._longest_run >= RUN_FAULT or share >= FLAT_FAULT:
            return "fault", said
        return ("warning" if self._longest_run >= RUN_WARNING else "ok"), said

    def _copies(self) -> tuple[Verdict, str]:
        again = len(self.copies) - len(set(self.copies))
        self.numbers["copied_samples"] = again
        said = f"{again:,} samples ({again / self.seen:.2%}) are exact copies of another"
        return _by_share(again / self.seen, 0.0, self.copy_fault), said

    @property
    def copy_fault(self) -> float:
        """Share of copied samples that is a fault; samples of few tokens coincide by nature."""
        return max(COPY_FAULT, 5 / self._seq_length)

    def stretches(self) -> np.ndarray:
        """Hashes of the stretches that were kept."""
        return np.concatenate(self._stretches) if self._stretches else np.zeros(0, np.uint64)

    @property
    def keep_one_of(self) -> int:
        """How sparsely stretches were kept; a power of 2."""
        return self._keep_one_of

    def _repeats(self) -> tuple[Verdict, str]:
        kept = self.stretches()
        if not kept.size:
            return "not checked", f"too little that is not one token, in stretches of {_STRETCH}"
        share = 1 - np.unique(kept).size / kept.size
        self.numbers["repeated_stretches"] = share
        said = f"{share:.1%} of the stretches of {_STRETCH} tokens occur again"
        return _by_share(share, REPEAT_WARNING, REPEAT_FAULT), said

    def _entropy(self) -> tuple[Verdict, str]:
        total = self._counts.sum()
        if not total:
            return "not checked", "no countable ids"
        shares = self._counts[self._counts > 0] / total
        entropy = float(-(shares * np.log(shares)).sum())
        self.numbers |= {"unigram_entropy": entropy, "different_ids": shares.size}
        said = f"{entropy:.2f} nats per token, {shares.size:,} different ids"
        if entropy < ENTROPY_FAULT:
            return "fault", f"{said}: hardly anything but one token"
        if entropy < ENTROPY_WARNING:
            return "warning", f"{said}: far less than text has"
        # With fewer tokens, chance alone makes the frequencies differ.
        enough = self._vocab_size and total >= 20 * self._vocab_size
        if enough and entropy > UNIFORM_SHARE * math.log(self._vocab_size):
            return "warning", f"{said}: as good as random, of which nothing is learned"
        return "ok", said


def _overlap(train: _Look, val: _Look) -> list[Finding]:
    """How much of what was seen of val was seen in train."""
    if not (train.seen and val.seen):
        return []
    shared = set(train.copies)
    again = sum(copy in shared for copy in val.copies)
    rate = max(train.keep_one_of, val.keep_one_of)
    ours, theirs = (look.stretches() for look in (val, train))
    ours = ours[_kept(ours, rate)]
    share = float(np.isin(ours, theirs).mean()) if ours.size else 0.0
    val.numbers |= {"samples_in_train": again, "stretches_in_train": share}
    said = (
        f"{again:,} samples ({again / val.seen:.2%}) and {share:.1%} of the stretches of "
        f"{_STRETCH} tokens stand in train too"
    )
    verdicts = {
        _by_share(again / val.seen, 0.0, val.copy_fault),
        _by_share(share, REPEAT_WARNING, REPEAT_FAULT),
    }
    worst = next(verdict for verdict in ("fault", "warning", "ok") if verdict in verdicts)
    return [Finding("val", "held out", worst, said)]


def _by_share(share: float, warning: float, fault: float) -> Verdict:
    if share >= fault:
        return "fault"
    return "warning" if share > warning else "ok"


def _runs_of_samples(
    wanted: int, there: int, seq_length: int, seed: int
) -> Iterator[tuple[int, int]]:
    """First sample and number of samples to read at once: all in order, or one of each stratum."""
    if wanted == there:
        step = max(1, _BLOCK_TOKENS // seq_length)
        for first in range(0, there, step):
            yield first, min(step, there - first)
        return
    edges = np.linspace(0, there, wanted + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    for first in rng.integers(edges[:-1], edges[1:]).tolist():
        yield first, 1


def _longest_run(tokens: np.ndarray) -> int:
    changes = np.flatnonzero(tokens[1:] != tokens[:-1])
    edges = np.concatenate([[-1], changes, [tokens.size - 1]])
    return int(np.diff(edges).max())


def _hash(row: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def _stretches(tokens: np.ndarray, keep_one_of: int) -> np.ndarray:
    """Hashes of the runs of 64 tokens, at every place, that are not one token all through.

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


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
