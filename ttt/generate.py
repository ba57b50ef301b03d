"""`generate`: read a text, learn from it, write on; or go on from what was read before.

The text goes to stdout, all else to stderr.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.console import Console

from ttt.config import differences, to_dict
from ttt.dataloader import builtin, text
from ttt.dataloader.text import AbstractTokenizer, ByteTokenizer
from ttt.entry import hydra_entry
from ttt.errors import UserError
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling
from ttt.inference.state import State, read_about, size_in_bytes
from ttt.infra import checkpoint, distributed, step_folders
from ttt.infra.progress import Progress
from ttt.knobs import Config
from ttt.model.published import load_model
from ttt.model.transformer import MetaModel

# What decides how a text is read: another value than in training is worth a word.
_READING = ("model.", "training.optimizer_inner.", "training.spec_inner", "training.train_mode")

_PLACES = 256
"""A full attention's cache is a multiple of this, so that compiled programs serve again."""


class Inputs(NamedTuple):
    """What the command works with, checked as far as it can be without the weights."""

    tokenizer: AbstractTokenizer
    step_folder: Path
    prompt: Int[np.ndarray, " T"]
    sampling: Sampling


def run(config: Config) -> None:
    """Read the prompt, or load a state, or both; write; say what was learned and what it took."""
    request, training = config.generate, config.training
    distributed.start(config.backend)
    inputs = prepare(config)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    model, _ = load_model(config.model, inputs.step_folder)
    console.print(f"checkpoint: {inputs.step_folder}")
    for key, (was, now) in changed(config, inputs.step_folder).items():
        console.print(f"note: {key} was {was} in training and is {now} here")
    context = request.context or places(config, len(inputs.prompt))
    engine = Engine(model, training, context=context, learn=request.learn)
    state, read_seconds = first_state(config, engine, console)
    engine.check(state, [inputs.prompt], request.max_new_tokens)
    began = time.perf_counter()
    console.print("compiling …")
    engine.compile(1, inputs.sampling if request.max_new_tokens else None)
    console.print(f"compiled in {time.perf_counter() - began:.1f} s")
    if len(inputs.prompt):
        fresh = not int(state.seen[0])
        state, seconds, nll = read(engine, state, inputs.prompt)
        read_seconds += seconds
        steps, tokens = int(engine.steps(state)[0]), len(inputs.prompt)
        console.print(
            f"read {tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s, "
            f"{steps} test-time steps taken so far"
        )
        losses = {"as read" + (", learning chunk by chunk" if engine.learns else ""): nll}
        if engine.learns and fresh and steps and request.compare:
            losses |= compare(config, model, engine, state, inputs.prompt)
        if len(nll):
            console.print("loss on the prompt (nats per token)")
            for label, values in losses.items():
                console.print(f"  {np.mean(values, dtype=np.float64):.4f}  {label}")
    if request.max_new_tokens:
        state = write(config, engine, state, inputs, console)
    if request.save_state:
        # With what the next reader wants to know.
        tokens, began = int(state.seen[0]), time.perf_counter()
        about = {"exp_name": training.exp_name, "tokens": tokens, "read_seconds": read_seconds}
        size = engine.save(request.save_state, state, about)
        console.print(
            f"state saved: {Path(request.save_state).expanduser().absolute()}, {size / 1e6:.1f} MB "
            f"for {tokens:,} tokens, in {time.perf_counter() - began:.2f} s"
        )


# ---- before anything is compiled -------------------------------------------------------------


def prepare(config: Config) -> Inputs:
    """Find everything that is named. Raises UserError for what is not there or does not fit."""
    request = config.generate
    step_folder = find_checkpoint(config)
    checkpoint.check_mode(step_folder, "jax")
    tokenizer = find_tokenizer(config, step_folder)
    try:
        ids = tokenizer.encode(prompt_of(config))
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 ({error}), which the tokenizer needs") from error
    if not request.load_state:
        if not len(ids):
            raise UserError(
                "the prompt is empty: write generate.prompt=TEXT, generate.prompt_file=FILE, or "
                "send text to standard input; or go on from a saved state (generate.load_state)"
            )
        ids = np.concatenate([np.array([tokenizer.bos_token_id], np.int32), ids])
    elif not len(ids) and not request.max_new_tokens:
        raise UserError("nothing to read and nothing to write: give a prompt or new tokens")
    if request.save_state and Path(request.save_state).expanduser().is_dir():
        raise UserError(f"generate.save_state={request.save_state} is a folder: name a file")
    sampling = Sampling(
        request.temperature, request.top_k, request.top_p, request.repetition_penalty
    ).check()
    return Inputs(tokenizer, step_folder, ids, sampling)


def find_checkpoint(config: Config) -> Path:
    """The step's folder that `generate.checkpoint` and `generate.step` name."""
    request, training = config.generate, config.training
    root = config.deploy_paths.checkpoint
    own = step_folders.run_folder(root, training.exp_folder, training.exp_name)
    return checkpoint.find_folder(root, request.checkpoint or str(own), request.step)


def find_tokenizer(config: Config, step_folder: Path) -> AbstractTokenizer:
    """The one requested, that of the checkpoint, or that of the dataset; it must fit the model."""
    request, model, name = config.generate, config.model, config.training.dataset_name
    root = config.deploy_paths.data.get(name, "")
    own = text.checkpoint_tokenizer(step_folder, step_folders.read_manifest(step_folder))
    if request.tokenizer:
        tokenizer = text.load_tokenizer(request.tokenizer)
        if own is not None and own.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"generate.tokenizer={request.tokenizer}: it is the tokenizer "
                f"{tokenizer.fingerprint}, and the model reads ids of {own.fingerprint}; leave it "
                "out, for the checkpoint has its own"
            )
    elif own is not None:
        tokenizer = own
    elif root and Path(root).exists():
        tokenizer = text.store_tokenizer(root)
    elif builtin.DATASETS.get(name) == "bytes":
        tokenizer = ByteTokenizer()
    else:
        raise UserError(
            f"the dataset {name}, which knows the tokenizer, is not at {root or 'any place'}: set "
            "generate.tokenizer to bytes or to a tokenizer's JSON file"
        )
    if tokenizer.vocab_size > model.vocab_size or tokenizer.bos_token_id != model.bos_token_id:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and BOS {tokenizer.bos_token_id}, the "
            f"model {model.vocab_size} and {model.bos_token_id}: name the tokenizer that the model "
            "was trained with (generate.tokenizer)"
        )
    return tokenizer


def prompt_of(config: Config) -> bytes:
    """The prompt's text, from where it comes."""
    request = config.generate
    if request.prompt:
        return request.prompt.encode()
    if request.prompt_file not in ("", "-"):
        path = Path(request.prompt_file).expanduser()
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"generate.prompt_file={path} cannot be read: {error}") from error
    # A loaded state is enough to go on from: standard input is then read only for `-`.
    is_read = request.prompt_file == "-" or (not request.load_state and not sys.stdin.isatty())
    return sys.stdin.buffer.read() if is_read else b""


def changed(config: Config, step_folder: Path) -> dict[str, tuple]:
    """Settings of reading that differ from the checkpoint's: key -> (there, here)."""
    try:
        stored = checkpoint.read_json(step_folder, "manifest")["config"]
    except (UserError, KeyError, OSError):  # a published checkpoint has no manifest
        return {}
    pairs = differences(stored, to_dict(config))
    return {key: pair for key, pair in pairs.items() if key.startswith(_READING)}


def first_state(config: Config, engine: Engine, console: Console) -> tuple[State, float]:
    """The state to start from, and the seconds that reading it took."""
    path = config.generate.load_state
    if not path:
        return engine.start(1), 0.0
    began = time.perf_counter()
    read_seconds = read_about(path, engine.fingerprint).get("read_seconds", 0.0)
    state = engine.load(path)
    if len(state.open) != 1:
        raise UserError(f"{path} holds {len(state.open)} sequences, and generate writes one")
    seconds = time.perf_counter() - began
    console.print(
        f"state: {int(state.seen[0]):,} tokens read before, {size_in_bytes(state) / 1e6:.1f} MB, "
        f"loaded in {seconds:.2f} s; reading them took {read_seconds:.2f} s, so "
        f"{read_seconds - seconds:.2f} s are saved"
    )
    return state, read_seconds


def places(config: Config, prompt: int) -> int:
    """The tokens that full attention needs caches for: as few as will do, for each costs time.

    A state that is loaded or saved has those of the trained length.
    """
    request, most = config.generate, config.training.seq_length
    if request.load_state or request.save_state:
        return most
    needed = -(-(prompt + request.max_new_tokens) // _PLACES) * _PLACES
    return min(needed, most)


# ---- the work --------------------------------------------------------------------------------


def read(
    engine: Engine, state: State, prompt: Int[np.ndarray, " T"], what: str = "read"
) -> tuple[State, float, np.ndarray]:
    """The state after the prompt, the seconds it took, and −log p of its tokens."""
    began, count = time.perf_counter(), len(prompt)
    with Progress(count, what, console=Console(stderr=True)) as progress:
        state, nll = engine.read(
            state, [prompt], on_progress=lambda done: progress.update(min(done, count))
        )
    return state, time.perf_counter() - began, nll[0]


def compare(
    config: Config, model: MetaModel, engine: Engine, state: State, prompt: Int[np.ndarray, " T"]
) -> dict[str, np.ndarray]:
    """−log p of the prompt by weights that stand still: those at its start, and at its end."""
    weights = {
        "without learning": model,
        "read again by the learned weights, which stand still": engine.learned(state),
    }
    losses = {}
    for label, fixed in weights.items():
        still = Engine(fixed, config.training, context=engine.context, learn=False)
        _, _, losses[label] = read(still, still.start(1), prompt, "compare")
    return losses


def write(config: Config, engine: Engine, state: State, inputs: Inputs, console: Console) -> State:
    """Write, each token shown when it is there."""
    request = config.generate

    def show(part: str) -> None:
        sys.stdout.write(part)
        sys.stdout.flush()

    stream = Stream(inputs.tokenizer, show)
    steps = int(engine.steps(state)[0])
    began = time.perf_counter()
    state, written = engine.write(
        state,
        request.max_new_tokens,
        inputs.sampling,
        seed=request.seed,
        stop=request.stop,
        on_progress=lambda new: stream.add(new[0]),
    )
    seconds = time.perf_counter() - began
    stream.end()
    count = len(written.tokens[0])
    console.print(
        f"wrote {count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s, "
        f"{int(engine.steps(state)[0]) - steps} test-time steps on the way"
        + (", up to a stop token" if count < request.max_new_tokens else "")
    )
    return state


class Stream:
    """Text of ids that come bit by bit: shown as far as it can no longer change."""

    def __init__(self, tokenizer: AbstractTokenizer, show: Callable[[str], object]):
        """Nothing is shown yet."""
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] = []
        self._shown = ""

    def add(self, ids: Int[np.ndarray, " N"]) -> None:
        """Show what follows from these; half a character waits for its other half."""
        self._ids += ids.tolist()
        now = self._tokenizer.decode(self._ids)
        if now.endswith("\ufffd"):
            return
        self._show(now[len(self._shown) :])
        self._shown = now
        if now.endswith("\n"):  # a good place to forget what came before
            self._ids, self._shown = [], ""

    def end(self) -> None:
        """Show the rest, and end the line."""
        self._show(self._tokenizer.decode(self._ids)[len(self._shown) :] + "\n")


main = hydra_entry(run)

if __name__ == "__main__":
    main()
