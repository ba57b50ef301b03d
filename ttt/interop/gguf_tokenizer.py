"""The tokenizer in a GGUF file's metadata, as the `tokenizers` library runs it. No JAX.

The metadata holds vocabulary and merges; how text is cut before the merges is only named, by
`tokenizer.ggml.pre`. The cuts are those of the models' own tokenizer files: ids must be equal, for
a wrong cut still decodes to the same text.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ttt.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of llama.cpp: never made by text; made by their whole text."""


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """The cut of Qwen2 and Llama 3, which differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_CUTS = {
    "smollm": _single_digits,
    "qwen2": lambda: _words(r"\p{N}"),
    "llama-bpe": lambda: _words(r"\p{N}{1,3}"),
}


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    """The tokenizer, ids as in the file; raises UserError if it is of another kind."""
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _CUTS:
        raise UserError(
            f"{where}: tokenizer.ggml.model={kind}, tokenizer.ggml.pre={cut}: only byte pairs "
            f"(gpt2) cut as {', '.join(_CUTS)} are supported; take the model as a Hugging Face "
            "folder, whose tokenizer.json says all"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise UserError(f"{where}: a token is in the vocabulary twice; convert the model again")
    # Llama 3 takes whole words that are tokens before it merges.
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(bpe)
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer
