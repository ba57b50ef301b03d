"""Text files to tokens to a token store, and the corpus that every Python installation holds.

A document is one file; BOS comes before each. Documents are put in a seeded order, and the first
share of them is held out as `val`, so that no document is in both splits.
"""

import glob
import hashlib
import os
import platform
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import numpy as np
import tokenizers
from jaxtyping import Int

from ttt.dataloader import token_store
from ttt.dataloader.token_store import OnProgress
from ttt.errors import UserError

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
TOKENIZER_FILE = "tokenizer.json"
BUILTIN_VAL_SHARE = 0.1

_GROUP_BYTES = 8 << 20
"""Text tokenized at a time: enough documents to occupy all cores, and little memory."""


class AbstractTokenizer(ABC):
    """Text <-> ids. No text becomes BOS or EOS: whoever joins documents adds those."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int | None

    def encode(self, text: str | bytes) -> Int[np.ndarray, " N"]:
        """Ids of one text, int32, without BOS; raises `UnicodeDecodeError` as `encode_many`."""
        return self.encode_many([text.encode() if isinstance(text, str) else text])[0]

    @abstractmethod
    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, int32, without BOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens left out."""


class ByteTokenizer(AbstractTokenizer):
    """One token per byte: ids 0-255, then BOS 256 and EOS 257. Takes any bytes, UTF-8 or not."""

    vocab_size = 258
    bos_token_id = 256
    eos_token_id: int | None = 257

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, int32, without BOS."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, BOS and EOS left out; bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if i < self.bos_token_id).decode(errors="replace")


class FileTokenizer(AbstractTokenizer):
    """A Hugging Face `tokenizers` JSON file. Takes UTF-8 alone."""

    def __init__(self, path: Path | str, bos_token: str | None = None):
        """Load `path`; BOS is `bos_token` or the first of `BOS_NAMES` that the vocabulary has.

        Raises `UserError` if the file cannot be read or has no such token.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"No tokenizer file at {self.path.resolve()}: give `bytes` or a JSON file."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self.path} is not a `tokenizers` JSON file: {error}") from error
        # Files may ask for truncation and padding, and turn `<s>` in a web page into BOS.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = (bos_token,) if bos_token else BOS_NAMES
        self.bos_token = next((name for name in names if name in vocabulary), None)
        if self.bos_token is None:
            raise UserError(
                f"{self.path} has no BOS token: tried {', '.join(names)}; "
                "name one of its tokens (--bos-token)."
            )
        self.bos_token_id = vocabulary[self.bos_token]
        self.eos_token_id = next((vocabulary[n] for n in EOS_NAMES if n in vocabulary), None)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text; raises `UnicodeDecodeError`. The library's threads use all cores."""
        decoded = [text.decode() for text in texts]
        encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(name: Path | str, bos_token: str | None = None) -> AbstractTokenizer:
    """Return `bytes` or the tokenizer of a JSON file; raises `UserError`."""
    if name != "bytes":
        return FileTokenizer(name, bos_token)
    if bos_token:
        raise UserError(f"The bytes tokenizer has its own BOS: leave out {bos_token!r}.")
    return ByteTokenizer()


def store_tokenizer(root: Path | str) -> AbstractTokenizer:
    """Return the tokenizer that made the store at `root`; raises `UserError` if it names none."""
    attributes = token_store.read_attributes(root)
    name = attributes.get("tokenizer")
    if not name:
        raise UserError(f"{root} does not name its tokenizer: give one (`bytes` or a JSON file).")
    file = name if name == "bytes" else Path(root) / name
    return load_tokenizer(file, attributes.get("bos_token"))


@dataclass(frozen=True)
class Corpus:
    """Documents, in the order in which they are stored."""

    source: str
    """A description for the store's attributes."""
    train: tuple[Path, ...]
    val: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of text in both splits."""
        return sum(path.stat().st_size for path in self.train + self.val)


def text_corpus(patterns: Sequence[str], *, seed: int, val_share: float) -> Corpus:
    """Collect the files that match glob `patterns` (`**`: any folders), each once.

    Raises `UserError` if a pattern matches no file, or all together fewer than two.
    """
    paths = set()
    for pattern in patterns:
        names = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = {Path(name).resolve() for name in names if os.path.isfile(name)}
        if not files:
            raise UserError(f"No file matches {pattern!r} from {Path.cwd()}.")
        paths |= files
    return _corpus(f"text files {shorten(' '.join(patterns), 120)}", paths, seed, val_share)


def builtin_corpus(*, seed: int) -> Corpus:
    """Collect the modules of the running Python's standard library, a tenth of them held out."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    paths = {p for p in root.rglob("*.py") if not foreign & set(p.relative_to(root).parts)}
    name = f"standard library of Python {platform.python_version()}"
    return _corpus(name, paths, seed, BUILTIN_VAL_SHARE)


def _corpus(source: str, paths: set[Path], seed: int, val_share: float) -> Corpus:
    """Order documents by a hash of seed and relative name: the same on every machine."""
    if not 0 < val_share < 1:
        raise UserError(f"The validation share must be between 0 and 1, not {val_share}.")
    if len(paths) < 2:
        raise UserError(
            f"{source}: {len(paths)} document; a file is a document, and train and val need one "
            "each. Split it into several files."
        )
    base = os.path.commonpath([path.parent for path in paths])

    def key(path: Path) -> bytes:
        return hashlib.sha256(f"{seed}:{path.relative_to(base).as_posix()}".encode()).digest()

    ordered = tuple(sorted(paths, key=key))
    held_out = min(max(1, round(len(ordered) * val_share)), len(ordered) - 1)
    source += f"; seed {seed}; {held_out} of {len(ordered)} documents held out"
    return Corpus(source, ordered[held_out:], ordered[:held_out])


def check_readable(corpus: Corpus, tokenizer: AbstractTokenizer) -> None:
    """Raise `UserError` that names every file `tokenizer` cannot take, before hours of work."""
    bad = []
    for path in () if isinstance(tokenizer, ByteTokenizer) else corpus.train + corpus.val:
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError:
            bad.append(str(path))
    if bad:
        raise UserError(
            f"{len(bad)} of the files are not UTF-8; convert them, leave them out or use the bytes "
            "tokenizer:\n  " + "\n  ".join(bad)
        )


def write_corpus(
    root: Path | str,
    corpus: Corpus,
    tokenizer: AbstractTokenizer,
    *,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Make a token store of `corpus` at `root`, with a copy of the tokenizer's file.

    Holds some 8 MB of text at a time, or the largest document. `train_tokens` and `val_tokens` are
    upper bounds, None for everything. `on_progress` gets documents.

    Raises `UserError`, leaving nothing behind, if `root` exists or a file is not what `tokenizer`
    takes.
    """
    token_store.refuse_existing(root)
    check_readable(corpus, tokenizer)
    attributes = {
        "source": corpus.source,
        "tokenizer": "bytes",
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    files = {}
    if isinstance(tokenizer, FileTokenizer):  # what `store_tokenizer` needs
        attributes |= {"tokenizer": TOKENIZER_FILE, "bos_token": tokenizer.bos_token}
        files = {TOKENIZER_FILE: tokenizer.path}
    done, total = 0, len(corpus.train) + len(corpus.val)

    def documents(paths: Sequence[Path], bound: int | None) -> Iterator[np.ndarray]:
        nonlocal done
        left = sys.maxsize if bound is None else bound
        for document in _documents(paths, tokenizer):
            yield document[:left]
            done += 1
            on_progress(done, total)
            left -= document.size
            if left <= 0:
                return

    splits = {
        "train": documents(corpus.train, train_tokens),
        "val": documents(corpus.val, val_tokens),
    }
    token_store.write(root, splits, attributes=attributes, files=files)
    on_progress(total, total)


def ensure_builtin(root: Path | str, *, on_progress: OnProgress = lambda done, total: None) -> None:
    """Make the built-in store at `root`, as bytes, unless it exists: seconds of work, once.

    Several processes may do so at once: each builds its own, and the first to finish stays.
    """
    if Path(root).exists():
        return
    try:
        write_corpus(root, builtin_corpus(seed=0), ByteTokenizer(), on_progress=on_progress)
    except token_store.StoreError:
        if not Path(root).exists():
            raise


def _documents(paths: Sequence[Path], tokenizer: AbstractTokenizer) -> Iterator[np.ndarray]:
    """BOS and ids of each file, tokenized in groups of about `_GROUP_BYTES`."""
    bos = np.array([tokenizer.bos_token_id], np.int32)
    group, size = [], 0
    for path in paths:
        group.append(path.read_bytes())
        size += len(group[-1])
        if size >= _GROUP_BYTES or path == paths[-1]:
            for ids in tokenizer.encode_many(group):
                yield np.concatenate([bos, ids])
            group, size = [], 0
