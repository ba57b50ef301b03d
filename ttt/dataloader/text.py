"""Text files to tokens to a token store.

A document is one file; BOS comes before each. Documents are put in a seeded order, and the first
share of them is held out as `val`, so that no document is in both splits.
"""

import glob
import hashlib
import json
import os
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from ttt.dataloader import token_store
from ttt.dataloader.token_store import OnProgress
from ttt.errors import UserError

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
TOKENIZER_FILE = "tokenizer.json"
BPE_VOCAB_SIZE = 2048

_BPE_BYTES = 12_000_000
_GROUP_BYTES = 8 << 20
"""Text tokenized at a time: enough documents to occupy all cores, and little memory."""


class AbstractTokenizer(ABC):
    """Text <-> ids. No text becomes BOS or EOS: whoever joins documents adds those."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int | None
    fingerprint: str
    """Of what decides which ids a text gets; equal where two tokenizers give the same."""

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
    fingerprint = "bytes"

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

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of vocabulary, merges and cuts, however the file writes them."""
        content = json.loads(self._tokenizer.to_str())
        model, cut = content["model"], json.dumps(content["pre_tokenizer"], sort_keys=True)
        parts = {
            "normalizer": content["normalizer"],
            # Offsets into the text, which ids do not depend on.
            "pre_tokenizer": re.sub(r'"trim_offsets": \w+', "", cut),
            "model": [model["type"], model.get("merges")],
            # Some files repeat their special tokens in the model's vocabulary, some do not.
            "vocabulary": self._tokenizer.get_vocab(with_added_tokens=True),
            "ignore_merges": bool(model.get("ignore_merges")),
            "added": sorted((t["id"], t["content"]) for t in content["added_tokens"]),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

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


def about_tokenizer(tokenizer: AbstractTokenizer | None) -> dict[str, str | None]:
    """What a checkpoint's manifest says of its tokenizer."""
    bos = tokenizer.bos_token if isinstance(tokenizer, FileTokenizer) else None
    return {"tokenizer": tokenizer.fingerprint if tokenizer else None, "bos_token": bos}


def tokenizer_files(tokenizer: AbstractTokenizer | None) -> dict[str, bytes]:
    """Name -> content of what lies in a checkpoint beside it."""
    is_file = isinstance(tokenizer, FileTokenizer)
    return {TOKENIZER_FILE: tokenizer.path.read_bytes()} if is_file else {}


def checkpoint_tokenizer(folder: Path, manifest: Mapping[str, Any]) -> AbstractTokenizer | None:
    """The tokenizer that a checkpoint brings along; None: it has none.

    folder: of the checkpoint. manifest: its content.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return FileTokenizer(folder / TOKENIZER_FILE, manifest.get("bos_token"))
    return ByteTokenizer() if manifest.get("tokenizer") == ByteTokenizer.fingerprint else None


def check_store(root: Path | str, fingerprint: str | None, model: str) -> None:
    """Raise `UserError` unless the store at `root` was made by a model's tokenizer.

    fingerprint: of that tokenizer; None: the model knows none. model: its name, for the message.
    """
    if fingerprint is None:
        return
    names = token_store.read_attributes(root).get("tokenizer")
    own = store_tokenizer(root).fingerprint if names else "that it does not name"
    if own != fingerprint:
        raise UserError(
            f"{root} was made by a tokenizer {own}, and {model} reads ids of the tokenizer "
            f"{fingerprint}: other ids are other text to it. Make the store anew with the "
            f"{TOKENIZER_FILE} in the model's checkpoint (scripts/04_make_token_data.py "
            "--tokenizer FILE)"
        )


@contextmanager
def tokenizer_for(
    name: str,
    corpus: "Corpus",
    vocab_size: int = BPE_VOCAB_SIZE,
    bos_token: str | None = None,
) -> Generator[AbstractTokenizer]:
    """`bytes`, a JSON file, or `bpe`: byte pairs counted in the corpus's training text.

    The file of a new tokenizer goes when the block ends; a store that is made inside keeps a copy.
    Raises `UserError`.
    """
    if name != "bpe":
        yield load_tokenizer(name, bos_token)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / TOKENIZER_FILE
        train_bpe(corpus, vocab_size).save(str(file))
        yield FileTokenizer(file)


def train_bpe(corpus: "Corpus", vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE, from the first 12 MB of the corpus's training text.

    Merges stay inside a line break with the blanks that follow it, a word with the blank before
    it, up to three digits, or a run of other signs. Any text survives encoding and decoding.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r"\n[ \t\n]*| ?[^\W\d]+|\d{1,3}| ?[^\s\w]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_NAMES[0], EOS_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def documents() -> Iterator[str]:
        size = 0
        for path in corpus.splits["train"]:
            data = path.read_bytes()
            yield data.decode()
            size += len(data)
            if size > _BPE_BYTES:
                return

    tokenizer.train_from_iterator(documents(), trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents, in the order in which they are stored."""

    source: str
    """A description for the store's attributes."""
    splits: Mapping[str, tuple[Path, ...]]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The documents of all splits."""
        return tuple(chain.from_iterable(self.splits.values()))

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(path.stat().st_size for path in self.paths)


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
    return Corpus(source, {"train": ordered[held_out:], "val": ordered[:held_out]})


def check_readable(corpus: Corpus) -> None:
    """Raise `UserError` that names every file that is not UTF-8, before hours of work.

    Tokenizers other than bytes take UTF-8 alone.
    """
    bad = []
    for path in corpus.paths:
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

    Leaves nothing behind where it raises: `UserError` if `root` exists, `UnicodeDecodeError` at a
    file that `tokenizer` cannot take (`check_readable` names them all before).
    """
    attributes: dict[str, Any] = {
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
    done, total = 0, len(corpus.paths)
    lengths = attributes["bytes_per_token"] = {}

    def documents(split: str) -> Iterator[np.ndarray]:
        nonlocal done
        bound = train_tokens if split == "train" else val_tokens
        left = sys.maxsize if bound is None else bound
        size = tokens = 0
        for letters, document in _documents(corpus.splits[split], tokenizer):
            yield document[:left]
            size, tokens = size + letters, tokens + document.size - 1
            lengths[split] = size / max(tokens, 1)
            done += 1
            on_progress(done, total)
            left -= document.size
            if left <= 0:
                return

    splits = {split: documents(split) for split in corpus.splits}
    token_store.write(root, splits, attributes=attributes, files=files)
    on_progress(total, total)


def _documents(
    paths: Sequence[Path], tokenizer: AbstractTokenizer
) -> Iterator[tuple[int, np.ndarray]]:
    """Bytes of each file, and BOS with its ids; tokenized in groups of about `_GROUP_BYTES`."""
    bos = np.array([tokenizer.bos_token_id], np.int32)
    group, size = [], 0
    for path in paths:
        group.append(path.read_bytes())
        size += len(group[-1])
        if size >= _GROUP_BYTES or path == paths[-1]:
            for data, ids in zip(group, tokenizer.encode_many(group), strict=True):
                yield len(data), np.concatenate([bos, ids])
            group, size = [], 0
