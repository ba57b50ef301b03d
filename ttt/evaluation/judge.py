"""Evaluators of text: counts of token pairs, one of our checkpoints, or a Hugging Face causal LM.

None of them learns while it reads: it would get used to a text's faults, such as repetition.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import UserError
from ttt.evaluation import resources
from ttt.evaluation.resources import LoadedModels, in_batches
from ttt.evaluation.suite import OnProgress
from ttt.knobs import Config
from ttt.model.trained import TrainedModel
from ttt.training import light
from ttt.training.count_model import CountModel

FOREIGN = "hf:"
COUNTED = 4_000_000
"""Tokens that `CountJudge` counts, at most."""


class Judged(NamedTuple):
    """One text under an evaluator."""

    position: Float[np.ndarray, " K"]
    """Where each scored token starts, in tokens of the text's own tokenizer."""
    nll: Float[np.ndarray, " K"]
    """−log p of it, in nats."""


class CountJudge:
    """Counts of token pairs that a run was trained on, `COUNTED` at most (`ttt.training.light`).

    It is there for every run, knows nothing beyond a pair, and is nobody's own text.
    """

    unit = "nats per token"

    def __init__(self, config: Config, run: TrainedModel):
        """Look for the training split of `evaluation.dataset_name`; raises a UserError."""
        split = replace(config.evaluation, split=run.training.data_split)
        own = replace(config, evaluation=split)
        try:
            self._source = resources.held_out(own, run, run.training.seq_length)
        except UserError as error:
            raise UserError(
                f"{error}\nWithout its training split there is nothing to count: name another "
                "evaluator (evaluation.long_decoding.evaluator=RUN or hf:FOLDER), or leave "
                "long_decoding out of evaluation.suites"
            ) from error
        training = replace(run.training, count_model_tokens=COUNTED)
        self._config = replace(config, model=run.config, training=training)
        self.name = f"token pairs of {resources.held_out_name(own)}"

    @cached_property
    def _counts(self) -> CountModel:
        return light.count(self._config, self._source)

    def read(
        self, texts: Sequence[Int[np.ndarray, " N"]], prefix: int, on_progress: OnProgress
    ) -> list[Judged]:
        """Score texts of one length, whose first `prefix` tokens somebody else wrote."""
        whole = np.stack(texts)
        places = np.arange(1.0, whole.shape[1])
        judged = [Judged(places, nll) for nll in self._counts.nll(whole[:, :-1], whole[:, 1:])]
        on_progress(len(judged))
        return judged


class OwnJudge:
    """A run at inner rate 0."""

    unit = "nats per token"

    def __init__(self, run: TrainedModel, models: LoadedModels, batch_size: int):
        self.name = run.name
        self._run, self._models, self._batch_size = run, models, batch_size

    def read(
        self, texts: Sequence[Int[np.ndarray, " N"]], prefix: int, on_progress: OnProgress
    ) -> list[Judged]:
        """Score texts of one length, whose first `prefix` tokens somebody else wrote."""
        engine = self._models.engine(self._run, len(texts[0]), learn=False)
        judged = []
        for rows in in_batches(len(texts), self._batch_size):
            _, scores = engine.read(engine.start(len(rows)), [texts[row] for row in rows])
            judged += [Judged(np.arange(1, len(nll) + 1.0), np.asarray(nll)) for nll in scores]
            on_progress(min(len(judged), len(texts)))
        return judged[: len(texts)]


class ForeignJudge:
    """A Hugging Face causal LM; it reads the text with its own tokenizer.

    Needs `transformers` and `torch`, which are imported when it reads.
    """

    unit = "nats per token of the evaluator"

    def __init__(self, folder: str, tokenizer: AbstractTokenizer):
        """Look for the folder and the libraries; raises a UserError."""
        self.name = Path(folder).name
        self._folder, self._tokenizer = Path(folder).expanduser(), tokenizer
        setting = f"evaluation.long_decoding.evaluator={FOREIGN}{folder}"
        if not (self._folder / "config.json").is_file():
            raise UserError(
                f"{setting}: no config.json in that folder; give the folder of a Hugging Face "
                "causal LM (as `save_pretrained` writes it), or the name of one of our runs"
            )
        missing = [n for n in ("transformers", "torch") if importlib.util.find_spec(n) is None]
        if missing:
            raise UserError(
                f"{setting}: it needs {' and '.join(missing)}; install with `uv pip install "
                f"--no-config {' '.join(missing)}` and run with `uv run --no-sync evaluate …`, or "
                "name one of our runs as evaluator"
            )

    def read(
        self, texts: Sequence[Int[np.ndarray, " N"]], prefix: int, on_progress: OnProgress
    ) -> list[Judged]:
        """Score texts, one after the other; a token's position is that of its first letter."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(self._folder, local_files_only=True)
        model.train(mode=False)
        judged = []
        for ids in texts:
            parts = [self._tokenizer.decode(part) for part in (ids[:prefix], ids[prefix:])]
            encoded = tokenizer(
                "".join(parts), return_offsets_mapping=True, add_special_tokens=False
            )
            nll = _nll(model, encoded["input_ids"])
            starts = np.array([start for start, _ in encoded["offset_mapping"]][1:], float)
            sizes = (prefix, len(ids) - prefix)
            judged.append(Judged(_positions(starts, [len(part) for part in parts], sizes), nll))
            on_progress(len(judged))
        return judged


def _nll(model: Any, ids: Sequence[int]) -> Float[np.ndarray, " K"]:
    """−log p of every token but the first, in float32."""
    import torch

    with torch.inference_mode():
        tokens = torch.tensor([ids], device=model.device)
        logits = model(tokens).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").numpy()


def _positions(
    starts: Float[np.ndarray, " K"], letters: Sequence[int], tokens: Sequence[int]
) -> Float[np.ndarray, " K"]:
    """Places in letters as places in tokens, evenly within each of both parts."""
    border, whole = letters[0], letters[0] + letters[1]
    return np.interp(starts, [0, border, max(whole, border + 1)], [0, tokens[0], sum(tokens)])


type Judge = CountJudge | OwnJudge | ForeignJudge
