"""A new token store from one of three sources: built-in text, text files, random ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt.dataloader import builtin, text, token_store
from ttt.dataloader.token_store import OnProgress
from ttt.errors import UserError

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "builtin": {
        "tokenizer": "bytes",
        "vocab_size": None,
        "train_tokens": None,
        "val_tokens": None,
    },
    "text": {
        "text": None,
        "tokenizer": "bytes",
        "vocab_size": None,
        "bos_token": None,
        "val_share": 0.1,
        "train_tokens": None,
        "val_tokens": None,
    },
    "random": {"vocab_size": 258, "train_tokens": 1_000_000, "val_tokens": 100_000},
}
"""Source -> the options it takes. Of text, tokens are upper bounds and None is all of it."""


def make_store(
    root: Path | str,
    source: str,
    *,
    seed: int = 0,
    dry_run: bool = False,
    on_progress: OnProgress = lambda done, total: None,
    **given: Any,
) -> str:
    """Make the store, or with `dry_run` check all that can be checked; return what it is, in words.

    `source` is a key of `DEFAULTS`, `given` its options; None stands for the default. Raises
    `UserError` for an option that the source does not take or a value that it cannot use.
    """
    options = _options(source, given)
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0.")
    token_store.refuse_existing(root)
    bounds = {name: options[name] for name in ("train_tokens", "val_tokens")}
    if source == "random":
        lengths = {"train": bounds["train_tokens"], "val": bounds["val_tokens"]}
        vocab_size = options["vocab_size"]
        if not dry_run:
            token_store.write_random(
                root, lengths, vocab_size=vocab_size, seed=seed, on_progress=on_progress
            )
        return f"random ids below {vocab_size}, {lengths['train']} train and {lengths['val']} val"
    if source == "builtin":
        corpus = builtin.corpus(seed=seed)
    else:
        corpus = text.text_corpus(options["text"], seed=seed, val_share=options["val_share"])
    name, vocab_size = options["tokenizer"], options["vocab_size"]
    if vocab_size and name != "bpe":
        raise UserError(
            f"vocab_size={vocab_size}: the tokenizer {name} has its own; give tokenizer bpe, or "
            "leave it out."
        )
    if vocab_size and vocab_size < text.ByteTokenizer.vocab_size:
        raise UserError(
            f"vocab_size={vocab_size}: 256 bytes, BOS and EOS alone are 258 ids; raise it."
        )
    vocab_size, bos_token = vocab_size or text.BPE_VOCAB_SIZE, options.get("bos_token")
    if name == "bpe" and bos_token:
        raise UserError(f"A new tokenizer has its own BOS: leave out {bos_token!r}.")
    if name != "bpe":
        text.load_tokenizer(name, bos_token)  # a fault of it comes before those of the files
    if name != "bytes":
        text.check_readable(corpus)
    if not dry_run:
        with text.tokenizer_for(name, corpus, vocab_size, bos_token) as tokenizer:
            text.write_corpus(root, corpus, tokenizer, **bounds, on_progress=on_progress)
    return f"{corpus.source}, from {corpus.size / 1e6:.1f} MB of text"


def _options(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the source with what was given; raises `UserError`."""
    given = {name: value for name, value in given.items() if value is not None}
    own = DEFAULTS[source]
    if foreign := [name for name in given if name not in own]:
        raise UserError(
            f"{', '.join(foreign)}: not for source {source}, which takes {', '.join(own)}."
        )
    for name in ("train_tokens", "val_tokens", "vocab_size"):
        if given.get(name, 1) < 1:
            raise UserError(f"{name}={given[name]} must be at least 1.")
    if given.get("vocab_size", 1) > 1 << 31:
        raise UserError(
            f"vocab_size={given['vocab_size']} must be at most {1 << 31}: a store holds int32."
        )
    if source == "text" and not given.get("text"):
        raise UserError("Source text needs the files: give globs (--text 'notes/**/*.txt').")
    return {**own, **given}
