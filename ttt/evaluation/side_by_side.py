"""One text, read twice at once: by a model that learns while it reads, and by the same, still."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ttt import config as settings
from ttt import figures
from ttt.dataloader import text as tokens
from ttt.errors import UserError
from ttt.inference.engine import Engine
from ttt.infra import step_folders
from ttt.infra.record import write_whole
from ttt.model.published import load_model

OnProgress = Callable[[int, int, float, float], None]
"""Called with tokens read, tokens in all, and the last stretch's mean loss, learning and not."""


@dataclass(frozen=True)
class SideBySide:
    """−log p in nats of every token but the first, and what reading took."""

    learning: Float[np.ndarray, " N"]
    still: Float[np.ndarray, " N"]
    seconds: tuple[float, float]
    """Learning, still; compiling included."""
    window: int
    chunk: int

    @property
    def gain(self) -> float:
        """Nats per token by which learning lowers the loss, over all tokens."""
        return float(np.mean(self.still - self.learning))

    def gain_beyond(self) -> float:
        """The same, over the tokens beyond the window."""
        return float(np.mean((self.still - self.learning)[self.window :]))


def encode(folder: Path, file: Path, most: int) -> Int[np.ndarray, " T"]:
    """BOS and the first ids of a text file, by the tokenizer in a checkpoint's folder.

    most: ids in all; 0: the whole text. Raises UserError for a file that cannot be read or is too
    short.
    """
    tokenizer = tokens.checkpoint_tokenizer(folder, step_folders.read_manifest(folder))
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: its text is unknown; choose another run")
    try:
        ids = tokenizer.encode(file.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}); give another file") from error
    ids = np.concatenate([np.array([tokenizer.bos_token_id], np.int32), ids])
    return ids[: most or None]


def read(
    folder: Path, ids: Int[np.ndarray, " T"], on_progress: OnProgress = lambda *numbers: None
) -> SideBySide:
    """Read `ids` with the checkpoint in `folder`, both ways, stretch by stretch.

    Raises UserError where the model does not learn, or the text has less than two chunks.
    """
    config = settings.of_stored(step_folders.read_manifest(folder)["config"])
    model, _ = load_model(config.model, folder)
    engines = [Engine(model, config.training, context=len(ids), learn=on) for on in (True, False)]
    if not engines[0].learns:
        raise UserError(f"{folder}: the model does not learn while it reads; choose one that does")
    chunk = config.model.mini_batch_size
    if len(ids) < 2 * chunk:
        raise UserError(
            f"the text has {len(ids)} tokens, and the model learns every {chunk}: give one of at "
            f"least {2 * chunk}"
        )
    states = [engine.start(1) for engine in engines]
    seconds, parts = [0.0, 0.0], ([], [])
    for first in range(0, len(ids), 2 * chunk):
        stretch = ids[first : first + 2 * chunk]
        for which, engine in enumerate(engines):
            began = time.perf_counter()
            states[which], nll = engine.read(states[which], [stretch])
            seconds[which] += time.perf_counter() - began
            parts[which].append(np.asarray(nll[0]))
        losses = (float(np.mean(part[-1])) for part in parts)
        on_progress(min(first + 2 * chunk, len(ids)), len(ids), *losses)
    learning, still = (np.concatenate(part) for part in parts)
    window = config.model.sliding_window_size
    return SideBySide(learning, still, (seconds[0], seconds[1]), window, chunk)


def draw(found: SideBySide, path: Path, title: str) -> Path:
    """Loss of both along the text, and what learning has gained so far, token by token."""
    figure, panels = figures.grid(2, 1, (8, 5.6), sharex=True)
    above, below = panels[:, 0]
    size = 2 * found.chunk
    whole = len(found.still) // size * size
    middle = np.arange(whole // size) * size + size / 2
    for number, (label, nll) in enumerate(
        {"learning while reading": found.learning, "not learning": found.still}.items()
    ):
        means = nll[:whole].reshape(-1, size).mean(axis=1)
        above.plot(middle, means, label=label, **figures.style(number))
    above.set_ylabel(f"loss of {size:,} tokens\n(nats per token)")
    above.legend(frameon=False)
    gained = np.cumsum(found.still - found.learning)
    below.plot(np.arange(len(gained)), gained, color=figures.COLOURS[2], lw=1.4)
    below.axhline(0, color="0.4", lw=1)
    below.set_ylabel("gained by learning so far (nats)")
    below.set_xlabel("tokens read")
    for axes in (above, below):
        figures.mark(axes, found.window, "attention window")
        figures.tidy(axes)
    figures.finish(figure, path, title)
    return path


def save(found: SideBySide, path: Path) -> Path:
    """Both losses of every token as CSV."""
    lines = ["token,learning,still"]
    pairs = zip(found.learning, found.still, strict=True)
    lines += [f"{place},{a:.6f},{b:.6f}" for place, (a, b) in enumerate(pairs, 1)]
    write_whole(path, "\n".join(lines) + "\n")
    return path
