"""What measurements need: models and engines on the devices, held-out text, its tokenizer."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from ttt import mixers
from ttt.dataloader import first_use, lm_dataset, text, token_store
from ttt.dataloader.lm_dataset import Source
from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import UserError
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling
from ttt.infra import step_folders
from ttt.infra.mesh import replicate
from ttt.knobs import Config
from ttt.model.trained import TrainedModel
from ttt.model.transformer import MetaModel

logger = logging.getLogger(__name__)

_MOST_LOADED = 2
"""Models on the devices at once: the one that is measured, and one that judges its text."""


class LoadedModels:
    """Puts trained models on the devices when they are needed, and lets old ones go."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._models: OrderedDict[str, MetaModel] = OrderedDict()
        self._engines: dict[tuple[str, bool, int], Engine] = {}

    def model(self, run: TrainedModel, context: int) -> MetaModel:
        """The run for sequences of `context` tokens, whole on every device."""
        return run.at(context, self._load(run))

    def engine(self, run: TrainedModel, context: int, *, learn: bool = True) -> Engine:
        """An engine for sequences of up to `context` tokens, compiled once for its run."""
        model = self._load(run)
        learn = learn and run.learns
        # A state of one size serves every length.
        key = (run.name, learn, context if mixers.grows(run.config) else 0)
        if key not in self._engines:
            self._engines[key] = Engine(model, run.training, context=context, learn=learn)
        return self._engines[key]

    def _load(self, run: TrainedModel) -> MetaModel:
        if run.name not in self._models:
            while len(self._models) >= _MOST_LOADED:
                name, _ = self._models.popitem(last=False)
                self._engines = {k: v for k, v in self._engines.items() if k[0] != name}
            self._models[run.name] = replicate(self.mesh, run.model)
        self._models.move_to_end(run.name)
        return self._models[run.name]


def in_batches(count: int, most: int) -> list[list[int]]:
    """Numbers 0 … count − 1 in batches of one size, the last filled up with its last number.

    One size, so that one compiled program serves; as few as `most` allows, and as even.
    """
    batches = -(-count // most)
    size = -(-count // batches)
    rows = [min(i, count - 1) for i in range(batches * size)]
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def write_on(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    stop: tuple[int, ...] = (),
    on_progress: Callable[[int], None],
) -> list[np.ndarray]:
    """The ids [M] written after each prompt [N], at most `tokens`; batches draw by own seeds."""
    result: list[np.ndarray] = []
    for batch, rows in enumerate(in_batches(len(prompts), batch_size)):
        state, _ = engine.read(engine.start(len(rows)), [prompts[row] for row in rows])
        _, written = engine.write(state, tokens, sampling, seed=seed + batch, stop=stop)
        result += [np.asarray(ids, np.int32) for ids in written.tokens]
        on_progress(min(len(result), len(prompts)))
    return result[: len(prompts)]


def store_folder(config: Config, run: TrainedModel) -> Path:
    """The held-out text's token store for a run; the built-in one is made on first use."""
    name, places = config.evaluation.dataset_name, config.deploy_paths.data
    if name not in places:
        raise UserError(
            f"evaluation.dataset_name={name}: this dataset has no place; add "
            f"+deploy_paths.data.{name}=FOLDER, or name one of {', '.join(places)}"
        )
    root = Path(places[name])
    if name in first_use.DATASETS and not root.exists():
        logger.info("making the dataset %s in %s", name, root)
        file = run.folder / text.TOKENIZER_FILE if run.folder else None
        first_use.ensure(name, root, tokenizer_file=file)
    return root


def held_out(config: Config, run: TrainedModel, length: int) -> Source:
    """Samples of `length` + 1 held-out tokens for a run; raises a UserError if there are none."""
    dummy = config.training.dummy_dataset
    root = "" if dummy else store_folder(config, run)
    try:
        if not dummy:
            text.check_store(root, run.tokenizer, run.name)
        return lm_dataset.open_source(
            root,
            config.evaluation.split,
            seq_length=length,
            vocab_size=run.config.vocab_size,
            bos_token_id=run.config.bos_token_id,
            dummy=dummy,
            remedy=token_store.remedy(config.evaluation.dataset_name, root),
        )
    except token_store.StoreError as error:
        raise UserError(f"{run.name} at {length} tokens: {error}") from error


def held_out_name(config: Config) -> str:
    """Where the text comes from, in words."""
    if config.training.dummy_dataset:
        return "random tokens"
    return f"{config.evaluation.dataset_name}/{config.evaluation.split}"


def tokenizer(config: Config, run: TrainedModel) -> AbstractTokenizer:
    """The tokenizer behind the text, which must fit the run's vocabulary; raises a UserError."""
    name, own = config.evaluation.tokenizer, None
    if run.folder is not None:
        own = text.checkpoint_tokenizer(run.folder, step_folders.read_manifest(run.folder))
    try:
        if name:
            tokenizer = text.load_tokenizer(name)
        else:
            tokenizer = own or text.store_tokenizer(store_folder(config, run))
    except UserError as error:
        raise UserError(f"{error} The evaluation takes it as evaluation.tokenizer=FILE.") from error
    fits = own is None or tokenizer.fingerprint == own.fingerprint
    model = run.config
    if tokenizer.vocab_size > model.vocab_size or tokenizer.bos_token_id != model.bos_token_id:
        fits = False
    if not fits:
        raise UserError(
            f"evaluation.tokenizer={name or config.evaluation.dataset_name}: it has "
            f"{tokenizer.vocab_size} ids, BOS {tokenizer.bos_token_id}, fingerprint "
            f"{tokenizer.fingerprint}, but {run.name} has model.vocab_size={model.vocab_size}, "
            f"bos_token_id={model.bos_token_id}, tokenizer {run.tokenizer or 'unknown'}: give the "
            "tokenizer it was trained with"
        )
    return tokenizer
