"""What a model writes after a held-out document, and how much of it the training text holds."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import zarr
from jaxtyping import Int

from ttt.dataloader import text, token_store
from ttt.dataloader.text import AbstractTokenizer
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling
from ttt.knobs import Config
from ttt.model.transformer import MetaModel

SAMPLING = Sampling(temperature=0.9, top_p=0.95)
LINES = 12
MOST_SEARCHED = 64_000_000
"""Training tokens, from the first, in which lines are looked up."""
_BLOCK = 1 << 20
_SHORTEST_LINE = 8


class Sample(NamedTuple):
    """A text written by a model."""

    read: int
    """Tokens of the held-out document that it read first."""
    text: str
    lines: int
    """Lines of the text with at least 8 letters, without blanks at their ends."""
    known: int
    """How many of these are lines of the training text as well."""


def write_sample(config: Config, model: MetaModel) -> Sample:
    """Read the start of a held-out document, learning where the model does, and write on.

    Up to `training.sample_tokens` tokens. Raises UserError if the store names no tokenizer.
    """
    training = config.training
    tokens = min(training.sample_tokens, training.seq_length // 2)
    root = Path(config.deploy_paths.data[training.dataset_name])
    tokenizer = text.store_tokenizer(root)
    held_out = token_store.open_split(root, training.eval_split)
    prompt = document(held_out, tokenizer.bos_token_id, training.seq_length - tokens)
    engine = Engine(jax.device_get(model), training, context=training.seq_length)
    state, _ = engine.read(engine.start(1), [prompt])
    end = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    _, written = engine.write(state, tokens, SAMPLING, stop=end)
    # The first line is the rest of one that was read, the last may not be complete.
    lines = tokenizer.decode(written.tokens[0]).splitlines()[1:-1][:LINES]
    train = token_store.open_split(root, training.data_split)
    known, counted = known_lines(lines, train, tokenizer)
    return Sample(len(prompt), "\n".join(lines), counted, known)


def document(split: zarr.Array, bos: int, most: int) -> Int[np.ndarray, " N"]:
    """The first `most` tokens of the first document that has so many, or of the split."""
    tokens = np.asarray(split[: 256 * max(most, 1)])
    starts = np.append(np.flatnonzero(tokens == bos), len(tokens))
    long = starts[:-1][np.diff(starts) >= most]
    first = int(long[0]) if len(long) else 0
    return tokens[first : first + most]


def known_lines(
    lines: list[str], split: zarr.Array, tokenizer: AbstractTokenizer
) -> tuple[int, int]:
    """(how many of the lines occur as lines of a split, how many were looked up).

    Blanks at the ends of a line do not count, and lines shorter than 8 letters are left out.
    """
    written = [line.strip() for line in lines if len(line.strip()) >= _SHORTEST_LINE]
    known: set[str] = set()
    for start in range(0, min(split.shape[0], MOST_SEARCHED), _BLOCK):
        # A line that the border of two blocks cuts is missed: one in some hundred thousand.
        block = tokenizer.decode(np.asarray(split[start : start + _BLOCK]))
        known |= set(written).intersection(map(str.strip, block.splitlines()))
    return sum(line in known for line in written), len(written)
