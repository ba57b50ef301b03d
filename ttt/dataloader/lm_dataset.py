"""From a token store to batches: samples in a seeded order that no number of hosts can change.

Sample i of a split of N tokens is tokens [i·T, (i+1)·T] inclusive, T + 1 of them; there are
(N - 1) // T samples.
"""

import zlib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TokenSource:
    """The samples of one split, by index. Raises `StoreError` if there is none."""

    tokens: zarr.Array | np.ndarray
    """[N] integers."""
    seq_length: int
    vocab_size: int
    name: str
    """For messages."""

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
        start = index * self.seq_length
        name = f"{self.name}, sample {index}"
        sample = token_store.read(self.tokens, start, start + self.seq_length + 1, name)
        if outside := token_store.ids_outside(sample, self.vocab_size):
            raise StoreError(
                f"{name}: token id {outside[0]} at position {outside[1]} is "
                f"outside [0, {self.vocab_size}), the model's vocabulary: the data was made with "
                "another tokenizer; use its model.vocab_size or other data."
            )
        return sample.astype(np.int32)


@dataclass(frozen=True)
class RandomTokens:
    """Uniform random samples in place of a store: sample i is a function of `seed` and i alone."""

    seq_length: int
    vocab_size: int
    seed: int
    name: str = "random tokens"

    def __len__(self) -> int:
        """Count samples: finite, so that an evaluation of "all" ends."""
        return _DUMMY_SAMPLES

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        """Draw T + 1 ids, int32."""
        rng = np.random.default_rng([self.seed, index])
        return rng.integers(0, self.vocab_size, self.seq_length + 1, dtype=np.int32)


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
    return TokenSource(array, seq_length, vocab_size, f"{root}/{split}")


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
    return _read(batches.map(lambda indices: indices[mine]), source, bos_token_id, threads)


def samples_of_batch(
    source: Source, number: int, *, global_batch_size: int, seed: int
) -> list[int]:
    """The samples in global batch `number` (from 0) of `train_batches`, without reading them."""
    return np.asarray(_order(source, global_batch_size, seed)[number]).tolist()


def _order(source: Source, global_batch_size: int, seed: int) -> grain.MapDataset:
    """Batches of indices without end, cut before the hosts part and before samples are read."""
    order = grain.MapDataset.range(len(source)).shuffle(seed=seed)
    return order.batch(global_batch_size, drop_remainder=True).repeat()


def eval_batches(
    source: Source, *, batch_size: int, max_batches: int, bos_token_id: int, threads: int = 2
) -> grain.DatasetIterator:
    """Iterate once, in order, over [batch_size, T], at most `max_batches` of them (0: all).

    The last batch of the split is smaller where the samples do not fill it.
    """
    batches = grain.MapDataset.range(len(source)).batch(batch_size)
    return _read(batches.slice(slice(max_batches or None)), source, bos_token_id, threads)


def _read(
    batches: grain.MapDataset, source: Source, bos_token_id: int, threads: int
) -> grain.DatasetIterator:
    """Turn batches of indices into batches of tokens, reading two batches ahead per thread."""

    def read(indices: np.ndarray) -> Batch:
        return from_tokens(np.stack([source[int(i)] for i in indices]), bos_token_id)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.map(read).to_iter_dataset(options))
