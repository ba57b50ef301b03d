"""Held-out text for evaluations: the token store, its tokenizer, and what must fit what."""

import logging
from pathlib import Path

from ttt.dataloader import lm_dataset, text, token_store
from ttt.dataloader.lm_dataset import Source
from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import UserError
from ttt.knobs import Config
from ttt.model.trained import TrainedModel

logger = logging.getLogger(__name__)


def root_of(config: Config) -> Path:
    """The store's folder; the built-in one is made on first use. Raises a UserError."""
    name, places = config.evaluation.dataset_name, config.deploy_paths.data
    if name not in places:
        raise UserError(
            f"evaluation.dataset_name={name}: this dataset has no place; add "
            f"+deploy_paths.data.{name}=FOLDER, or name one of {', '.join(places)}"
        )
    root = Path(places[name])
    if name == "builtin" and not root.exists():
        logger.info("making the built-in corpus (the standard library's source) in %s", root)
        text.ensure_builtin(root)
    return root


def source(config: Config, run: TrainedModel, length: int) -> Source:
    """Samples of `length` + 1 held-out tokens for a run; raises a UserError if there are none."""
    dummy = config.training.dummy_dataset
    root = "" if dummy else root_of(config)
    name, split = config.evaluation.dataset_name, config.evaluation.split
    try:
        return lm_dataset.open_source(
            root,
            split,
            seq_length=length,
            vocab_size=run.config.vocab_size,
            bos_token_id=run.config.bos_token_id,
            dummy=dummy,
            remedy=token_store.remedy(name, root),
        )
    except token_store.StoreError as error:
        raise UserError(f"{run.name} at {length} tokens: {error}") from error


def tokenizer(config: Config, run: TrainedModel) -> AbstractTokenizer:
    """The tokenizer behind the text, which must fit the run's vocabulary; raises a UserError."""
    asked = config.evaluation.tokenizer
    try:
        found = text.load_tokenizer(asked) if asked else text.store_tokenizer(root_of(config))
    except UserError as error:
        raise UserError(f"{error} The evaluation takes it as evaluation.tokenizer=FILE.") from error
    if found.vocab_size > run.config.vocab_size or found.bos_token_id != run.config.bos_token_id:
        raise UserError(
            f"evaluation.tokenizer={asked or root_of(config)} has {found.vocab_size} ids and BOS "
            f"{found.bos_token_id}, but {run.name} has model.vocab_size={run.config.vocab_size} "
            f"and bos_token_id={run.config.bos_token_id}: give the tokenizer it was trained with"
        )
    return found
