"""From a token store to batches: samples in a seeded order that no number of hosts can change.

Sample i of a split of N tokens is tokens [i·T, (i+1)·T] inclusive, T + 1 of them; there are
(N - 1) // T samples.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grain
import numpy as np
import zarr
from jaxtyping import Int

from ttt.core.batch import Batch, from_tokens
from ttt.dataloader import token_store
from ttt.dataloader.token_store import StoreError
from ttt.errors import UserError

_DUMMY_SAMPLES = 1024
_LONGEST_DOCUMENT = 1 << 22
"""Tokens that are looked through for a document's start; one that is longer counts as several."""


@dataclass(frozen=True)
class TokenSource:
    """The samples of one split, by index. Raises `StoreError` if there is none."""

    tokens: zarr.Array | np.ndarray
    """[N] integers."""
    seq_length: int
    vocab_size: int
    name: str
    """For messages."""
    bytes_per_token: float | None = None
    """Bytes of text to a token of the split, its BOS left out; None: the store does not say."""

    def __post_init__(self):
        if not len(self):
            raise StoreError(
                f"{self.name} holds {self.tokens.shape[0]} tokens, and one sample of "
                f"training.seq_length={self.seq_length} takes {self.seq_length + 1}: "
                "lower training.seq_length or add data."
            )

    def __len__(self) -> int:
        """Count samples."""
        return max(0, self.tokens.shape[0] - 1) // self.seq_length

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        """Read T + 1 ids, int32; raises `StoreError` at damage or an id beyond the vocabulary."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has samples 0 to {len(self) - 1}, not {index}")
        return self.read(index * self.seq_length)

    def read(self, start: int) -> Int[np.ndarray, " tokens"]:
        """Read the T + 1 ids from `start` on, int32; raises as `[]` does."""
        name = f"{self.name}, sample {start // self.seq_length}"
        sample = token_store.read(self.tokens, start, start + self.seq_length + 1, name)
        if outside := token_store.ids_outside(sample, self.vocab_size):
            raise StoreError(
                f"{name}: token id {outside[0]} at position {outside[1]} is "
                f"outside [0, {self.vocab_size}), the model's vocabulary: the data was made with "
                "another tokenizer; use its model.vocab_size or other data."
            )
        return sample.astype(np.int32)

    def last(self, token: int, start: int, stop: int) -> int | None:
        """The last place of a token among [start, stop), read block by block from the end."""
        while stop > start:
            begin = max(start, stop - token_store.CHUNK_TOKENS)
            places = np.flatnonzero(token_store.read(self.tokens, begin, stop, self.name) == token)
            if len(places):
                return begin + int(places[-1])
            stop = begin
        return None


@dataclass(frozen=True)
class RandomTokens:
    """Uniform random samples in place of a store: sample i is a function of `seed` and i alone."""

    seq_length: int
    vocab_size: int
    seed: int
    name: str = "random tokens"
    bytes_per_token: None = None

    def __len__(self) -> int:
        """Count samples: finite, so that an evaluation of "all" ends."""
        return _DUMMY_SAMPLES

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        """Draw T + 1 ids, int32."""
        rng = np.random.default_rng([self.seed, index])
        return rng.integers(0, self.vocab_size, self.seq_length + 1, dtype=np.int32)

    def read(self, start: int) -> Int[np.ndarray, " tokens"]:
        """Draw the sample that token `start` is in."""
        return self[start // self.seq_length]


Source = TokenSource | RandomTokens


def open_source(
    root: Path | str,
    split: str,
    *,
    seq_length: int,
    vocab_size: int,
    bos_token_id: int,
    dummy: bool = False,
    remedy: str = token_store.MAKE_REMEDY,
) -> Source:
    """Open `<root>/<split>` for a model of `vocab_size` ids; with `dummy`, random tokens, no disk.

    Raises `StoreError` if the split is unusable (see `token_store.open_split`) or shorter than one
    sample, or if the store was made for a larger vocabulary or another `bos_token_id` than the
    model's.
    """
    if dummy:
        seed = zlib.crc32(split.encode())  # differs by split, the same in every process
        return RandomTokens(seq_length, vocab_size, seed, f"random tokens ({split})")
    array = token_store.open_split(root, split, remedy=remedy)
    stored = token_store.read_attributes(root)
    if stored.get("vocab_size", 0) > vocab_size:
        raise StoreError(
            f"{root} was made with vocab_size={stored['vocab_size']}, more than the model's "
            f"{vocab_size}: set model.vocab_size to at least that, or use other data."
        )
    if stored.get("bos_token_id", bos_token_id) != bos_token_id:
        raise StoreError(
            f"{root} starts its documents with id {stored['bos_token_id']}, the model with "
            f"{bos_token_id}: set model.bos_token_id={stored['bos_token_id']}, or use other data."
        )
    bytes_per_token = stored.get("bytes_per_token", {}).get(split)
    if bytes_per_token is None and stored.get("tokenizer") == "bytes":
        bytes_per_token = 1.0
    return TokenSource(array, seq_length, vocab_size, f"{root}/{split}", bytes_per_token)


def train_batches(
    source: Source,
    *,
    global_batch_size: int,
    seed: int,
    bos_token_id: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 4,
) -> grain.DatasetIterator:
    """Iterate without end over this host's share of each batch, [global_batch_size / hosts, T].

    Each epoch has another order, drawn from `seed` (0 to 2^32 - 1), and leaves out what does not
    fill a global batch. Host h takes the h-th run of each global batch and reads no other sample.
    `get_state()` is `{"next_index": n}` after n global batches, so a position also fits another
    number of hosts. `threads` threads read ahead.

    Raises `UserError` if the hosts cannot share a batch evenly, or if there are fewer samples than
    one batch.
    """
    if global_batch_size % hosts:
        raise UserError(
            f"training.global_batch_size={global_batch_size} must be a multiple of the number of "
            f"hosts, {hosts}: change either."
        )
    if len(source) < global_batch_size:
        raise UserError(
            f"{source.name} holds {len(source)} samples of training.seq_length="
            f"{source.seq_length}, fewer than training.global_batch_size={global_batch_size}: "
            "lower either or add data."
        )
    share = global_batch_size // hosts
    batches = _order(source, global_batch_size, seed)
    mine = slice(host * share, (host + 1) * share)
    share_of = batches.map(lambda indices: indices[mine])
    return _read(share_of, source.__getitem__, bos_token_id, threads)


def samples_of_batch(
    source: Source, number: int, *, global_batch_size: int, seed: int
) -> list[int]:
    """The samples in global batch `number` (from 0) of `train_batches`, without reading them."""
    return np.asarray(_order(source, global_batch_size, seed)[number]).tolist()


def _order(source: Source, global_batch_size: int, seed: int) -> grain.MapDataset:
    """Batches of indices without end, cut before the hosts part and before samples are read."""
    order = grain.MapDataset.range(len(source)).shuffle(seed=seed)
    return order.batch(global_batch_size, drop_remainder=True).repeat()


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Stretches of a split that losses are measured on, and the documents that they are of."""

    source: Source
    starts: Int[np.ndarray, " N"]
    """The first token of each stretch of T tokens; its last target is the token behind it."""
    bos_token_id: int

    @classmethod
    def drawn(cls, source: Source, bos_token_id: int, *, seed: int, count: int = 0) -> "HeldOut":
        """`count` samples of a split, or all there are (0: all), in an order that `seed` fixes.

        The first stretches of a larger draw are those of a smaller one.
        """
        order = np.random.default_rng(seed).permutation(len(source))
        return cls(source, order[: count or None] * source.seq_length, bos_token_id)

    def cut(self, source: Source, bos_token_id: int) -> "HeldOut":
        """The same text, each stretch cut into as many of `source.seq_length` as it has whole."""
        length = source.seq_length
        pieces = np.arange(self.source.seq_length // length) * length
        return HeldOut(source, (self.starts[:, None] + pieces).ravel(), bos_token_id)

    def __len__(self) -> int:
        """Count stretches."""
        return len(self.starts)

    def batches(self, batch_size: int, *, most: int = 0, threads: int = 2) -> grain.DatasetIterator:
        """Iterate once, in order, over [batch_size, T], at most `most` of them (0: all).

        The last one is smaller where the stretches do not fill it.
        """
        batches = grain.MapDataset.range(len(self)).batch(batch_size).slice(slice(most or None))
        starts = self.starts.tolist()
        return _read(batches, lambda i: self.source.read(starts[i]), self.bos_token_id, threads)

    def documents(self, first: int, batch: Batch) -> Int[np.ndarray, "B T"]:
        """The document of every target of a batch whose first stretch is number `first`.

        A document is named by the place of its BOS in the split. Of random tokens, where BOS means
        nothing, each stretch is a document.
        """
        mine = slice(first, first + len(batch.inputs))
        own, starts = self._beginnings[mine, None], self.starts[mine, None]
        if isinstance(self.source, RandomTokens):
            return np.broadcast_to(starts, batch.inputs.shape)
        places = starts + np.arange(batch.inputs.shape[1])
        begun = np.where(batch.inputs == self.bos_token_id, places, own)
        return np.maximum.accumulate(begun, axis=1)

    @cached_property
    def _beginnings(self) -> Int[np.ndarray, " N"]:
        """Of the document that each stretch starts in, looked for backwards from its first token.

        It ends at the stretch before it in the split, whose document is known by then.
        """
        beginnings = np.zeros_like(self.starts)
        if isinstance(self.source, RandomTokens):
            return beginnings
        before, document = -1, 0
        for i in np.argsort(self.starts):
            start = int(self.starts[i])
            least = max(before + 1, start - _LONGEST_DOCUMENT)
            place = self.source.last(self.bos_token_id, least, start + 1)
            if place is not None:
                document = place
            elif least > before + 1:
                document = least
            beginnings[i], before = document, start
        return beginnings


def _read(
    batches: grain.MapDataset,
    sample: Callable[[int], Int[np.ndarray, " tokens"]],
    bos_token_id: int,
    threads: int,
) -> grain.DatasetIterator:
    """Turn batches of indices into batches of tokens, reading two batches ahead per thread."""

    def read(indices: np.ndarray) -> Batch:
        return from_tokens(np.stack([sample(int(i)) for i in indices]), bos_token_id)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.map(read).to_iter_dataset(options))
