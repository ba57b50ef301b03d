r"""Tokens per second from a token store into batches, without a model.

Each row reads whole global batches, shuffled, as training does; cold rows start after the store's
files are dropped from the system's cache. The slowest row is compared with what a run needs.

  uv run python tools/loader_speed.py --needs 500000

Exit codes: 0 fast enough, 1 not
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ttt.dataloader import lm_dataset, token_store


def drop_from_cache(root: Path) -> bool:
    """Drop the store's files from the system's cache; false where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # only what is on the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    return True


def speed(source: lm_dataset.Source, batch: int, threads: int, seconds: float) -> float:
    """Tokens per second, after the first batch."""
    batches = lm_dataset.train_batches(
        source, global_batch_size=batch, seed=0, bos_token_id=0, threads=threads
    )
    next(batches)
    began, tokens = time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        tokens += next(batches).inputs.size
    return tokens / spent


def main() -> int:
    """Run and return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--store", type=Path, help="default: a store of random ids, made for this")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of the store that is made")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4], help="training has 4")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--needs", type=float, default=500_000, help="tokens/s of a run")
    options = parser.parse_args()
    table = Table("seq_length", "threads", "files", "tokens/s", "times the need")
    slowest = float("inf")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.store or Path(temporary) / "store"
        if options.store is None:
            token_store.write_random(root, {"train": options.tokens}, vocab_size=128256, seed=0)
        rows = itertools.product(options.lengths, options.threads, ("cold", "warm"))
        for length, threads, files in rows:
            source = lm_dataset.open_source(
                root, options.split, seq_length=length, vocab_size=1 << 31, bos_token_id=0
            )
            if files == "cold" and not drop_from_cache(root):
                continue
            rate = speed(source, options.batch, threads, options.seconds)
            slowest = min(slowest, rate)
            times = f"{rate / options.needs:.1f}"
            table.add_row(str(length), str(threads), files, f"{rate:,.0f}", times)
    Console().print(table)
    print(f"slowest: {slowest:,.0f} tokens/s; needed: {options.needs:,.0f}")
    return 0 if slowest >= options.needs else 1


if __name__ == "__main__":
    sys.exit(main())
