r"""Our checkpoints as a model of EleutherAI's lm-evaluation-harness, under the name `ttt`.

    uv run --extra eval python -m ttt.evaluation.harness run --model ttt --tasks lambada_openai \
        --model_args experiment=tiny/pretrain/pretrain-tiny-e2e

Needs the extra `eval`. Importing this module registers the model; running it is the harness's own
command line after that. A model that learns while it reads does so within each request.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ttt import mixers
from ttt.config import compose, resolve
from ttt.errors import UserError
from ttt.evaluation import resources
from ttt.evaluation.resources import LoadedModels, in_batches
from ttt.inference.sampling import Sampling
from ttt.infra.mesh import device_mesh
from ttt.infra.progress import Progress
from ttt.model import trained

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"the evaluation harness is missing ({error}); install it with the extra: "
        "uv run --extra eval …"
    ) from error

_MAX_GEN_TOKS = 128


@register_model("ttt")
class HarnessModel(LM):
    """One run, answering the harness's three kinds of requests."""

    def __init__(
        self,
        experiment: str = "",
        *,
        run: str = "",
        exp_folder: str = "",
        step: int = -1,
        tokenizer: str = "",
        learn: bool = True,
        max_length: int = 0,
        batch_size: int | str = 4,
        **ignored: Any,
    ):
        """Load a checkpoint.

        experiment: as in `+experiment=NAME`; run, exp_folder, step: which of its checkpoints.
            Without an experiment, run is FOLDER/NAME, as in `+run=FOLDER/NAME`.
        tokenizer: `bytes`, a `tokenizers` JSON file or a folder with a `tokenizer.json`; empty: the
            one of the checkpoint or of the experiment's token store.
        learn: off: the inner rate is 0.
        max_length: tokens of a request; 0: the trained length. Binding where the state
            grows with the context.
        ignored: what the harness itself adds (device, …).
        """
        super().__init__()
        if tokenizer and Path(tokenizer).is_dir():
            tokenizer = str(Path(tokenizer) / "tokenizer.json")
        settings = {"evaluation.tokenizer": tokenizer}
        if experiment:
            settings |= {"training.exp_name": run, "training.exp_folder": exp_folder}
        overrides = [f"{key}='{value}'" for key, value in settings.items() if value]
        start = f"+experiment={experiment}" if experiment else f"+run={run}"
        config = resolve(compose([start, f"evaluation.step={step}", *overrides]))
        (self._run,) = trained.load(config)
        self._tokenizer = resources.tokenizer(config, self._run)
        self.max_length = max_length or self._run.training.seq_length
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 4
        self._bounded = mixers.grows(self._run.config)
        self._engine = LoadedModels(device_mesh()).engine(self._run, self.max_length, learn=learn)

    # ---- the harness's requests ----

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding would say the same) of each continuation."""
        return self._score([self._parts(*request.args) for request in requests], greedy=True)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log p of whole texts.

        Where the state grows, texts longer than `max_length` are read window by window.
        """
        scores = []
        for request in self._with_progress(requests, "rolling log-likelihood"):
            ids = self._tokenizer.encode(request.args[0]).tolist()
            bos = self._tokenizer.bos_token_id
            if not self._bounded or len(ids) < self.max_length:
                windows = [([bos], ids)]
            else:
                windows = map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        ids, prefix_token=bos, max_seq_len=self.max_length - 1, context_len=1
                    ),
                )
            pieces = [(np.asarray(a, np.int32), np.asarray(b, np.int32)) for a, b in windows]
            scores.append(sum(score for score, _ in self._score(pieces, greedy=False)))
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop texts."""
        texts = []
        for request in self._with_progress(requests, "generate"):
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            tokens = int(options.get("max_gen_toks", _MAX_GEN_TOKS))
            drawn = options.get("do_sample", options.get("temperature", 0) > 0)
            sampling = Sampling(
                temperature=float(options.get("temperature", 1.0)) if drawn else 0.0,
                top_k=int(options.get("top_k", 0)) if drawn else 0,
                top_p=float(options.get("top_p", 1.0)) if drawn else 1.0,
            )
            ids = self._shortened(self._with_bos(self._tokenizer.encode(context)), tokens)
            state, _ = self._engine.read(self._engine.start(1), [ids])
            eos = self._tokenizer.eos_token_id
            stop = () if eos is None else (eos,)
            _, written = self._engine.write(state, tokens, sampling, seed=len(texts), stop=stop)
            said = self._tokenizer.decode(np.asarray(written.tokens[0]))
            texts.append(min((said.split(end)[0] for end in until if end), key=len, default=said))
        return texts

    # ---- what they are made of ----

    def _with_progress(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """The items, with a line of progress."""
        with Progress(len(items), f"{self._run.name}: {what}") as progress:
            for done, item in enumerate(items, start=1):
                yield item
                progress.update(done)

    def _with_bos(self, ids: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
        return np.concatenate([np.array([self._tokenizer.bos_token_id], np.int32), ids])

    def _parts(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of both, cut where the joint text's tokens leave the context's.

        Blanks at the context's end count to the continuation, as the harness does it.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole = self._tokenizer.encode(bare + continuation)
        cut = len(self._tokenizer.encode(bare))
        return self._with_bos(whole[:cut]), whole[cut:]

    def _shortened(self, ids: np.ndarray, reserved: int) -> np.ndarray:
        """The last tokens, so that full attention has slots for as many more."""
        if not self._bounded:
            return ids
        return ids[-max(1, self.max_length - reserved) :]

    def _score(
        self, pieces: Sequence[tuple[np.ndarray, np.ndarray]], *, greedy: bool
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        batches = in_batches(len(pieces), self._batch_size) if pieces else []
        for rows in self._with_progress(batches, "log-likelihood") if greedy else batches:
            ends = [pieces[row][1] for row in rows]
            starts = [self._shortened(pieces[row][0], len(pieces[row][1])) for row in rows]
            state, _ = self._engine.read(self._engine.start(len(rows)), starts)
            _, scores = self._engine.read(state, ends)
            said: Sequence[np.ndarray] = ends
            if greedy:
                longest = max(len(end) for end in ends)
                said = self._engine.write(state, longest, Sampling(temperature=0.0))[1].tokens
            results += [
                (-float(np.sum(nll, dtype=np.float64)), bool(np.array_equal(s[: len(e)], e)))
                for nll, s, e in zip(scores, said, ends, strict=True)
            ]
        return results[: len(pieces)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    # Run as a script this file is `__main__`; the registry must not meet the class a second time.
    sys.modules["ttt.evaluation.harness"] = sys.modules["__main__"]
    cli_evaluate()
