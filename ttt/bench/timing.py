"""Compiled calls of several variants, timed in turns in one process.

A call reads a whole batch of random tokens: a training step, the outer gradient alone, prefill or
evaluation; or it writes tokens after a context (`ttt.knobs.BenchmarkCalls`). Reading and writing
are the engine's, on one device. Turns (A B A B ...) let the drift of a shared machine hit all
variants alike.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ttt import mixers
from ttt.core import compiling
from ttt.core.batch import Batch, from_tokens
from ttt.inference.engine import CHUNK_OF_FULL_ATTENTION, TOKENS_PER_CALL, Engine
from ttt.inference.sampling import Sampling
from ttt.infra.mesh import Layout, shard_batch
from ttt.knobs import Config, ModelConfig, TrainingConfig
from ttt.model import loop
from ttt.model.transformer import MetaModel
from ttt.plan.flops import learned, model_flops, reading_flops
from ttt.plan.hardware import peak_flops


@dataclass(frozen=True)
class Timing:
    """What one variant took for one call at one context; `failed` says why there are no numbers."""

    variant: str
    call: str
    context: int
    """Tokens in a sequence."""
    sequences: int
    seconds: tuple[float, ...] = ()
    """Of each timed call."""
    compile_s: float | None = None
    """Tracing included, no cache."""
    temp_mb: float | None = None
    """Memory of a device beside arguments and results; of the engine's calls, that of reading, the
    sequences' states included. None where the backend does not tell."""
    flops: float | None = None
    """Of a call, as the mathematics needs them (`ttt.plan.flops`, model FLOPs)."""
    mfu: float | None = None
    """Share of the devices' peak; None where that is unknown."""
    failed: str | None = None
    tokens: int | None = None
    """Of each sequence in a call; None: the whole context."""
    learns: bool = False
    """Whether the variant learns while it reads."""
    grows: bool = False
    """Whether its state grows with the context."""

    @property
    def median(self) -> float:
        """Seconds; NaN where there is none."""
        return float(np.median(self.seconds)) if self.seconds else math.nan

    @property
    def tokens_per_s(self) -> float:
        """Over all devices."""
        return (self.tokens or self.context) * self.sequences / self.median

    @property
    def s_per_1k_tokens(self) -> float:
        """Seconds for 1,000 tokens of throughput, as the paper's figures count.

        Of one sequence written token by token, the milliseconds of each.
        """
        return self.per_1k_tokens(self.median)

    def per_1k_tokens(self, seconds: float) -> float:
        """The same, for a call that takes so many seconds."""
        return 1000 * seconds / (self.tokens or self.context) / self.sequences

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the fields, the spread, and what follows from them."""
        names = ("variant", "call", "context", "sequences")
        if self.failed is not None:
            return {name: getattr(self, name) for name in (*names, "failed")}
        low, q1, median, q3, high = np.quantile(self.seconds, (0, 0.25, 0.5, 0.75, 1)).tolist()
        figures = ("s_per_1k_tokens", "tokens_per_s", "compile_s", "temp_mb", "flops", "mfu")
        return {
            **{name: getattr(self, name) for name in names},
            "step_s": median,
            "spread_s": {"min": low, "q1": q1, "q3": q3, "max": high},
            "seconds": list(self.seconds),
            **{name: getattr(self, name) for name in figures},
        }


# ---- the calls -------------------------------------------------------------------------


def _gradient(config: Config, layout: Layout) -> Callable[[MetaModel, Batch], PyTree]:
    of_steps = loop.make_gradient(config.training, layout)
    return lambda model, batch: of_steps(
        model, jax.tree.map(lambda x: x[None], batch), jnp.ones(())
    )


def _evaluate(config: Config, layout: Layout) -> Callable[[MetaModel, Batch], tuple[Array, Array]]:
    scores = loop.make_scores(config.training, layout)
    return lambda model, batch: scores(model, batch, jnp.ones(()))


_CALLS = {
    "train_step": lambda config, layout: loop.make_train_step(config.training, layout),
    "gradient": _gradient,
    "evaluate": _evaluate,
}
BATCH_CALLS = frozenset(_CALLS)
"""Calls whose batches are divided over all devices."""


class BatchProgram:
    """One call, compiled for one configuration, with its arguments on the devices."""

    def __init__(self, config: Config, call: str):
        """Compile. Raises jax.errors.JaxRuntimeError where memory does not suffice."""
        self.tokens: int | None = None
        self._trains = call == "train_step"
        layout = loop.lay_out(config)
        shardings = layout.shardings(jax.eval_shape(lambda: _initial(config, call)))
        self._state = jax.jit(lambda: _initial(config, call), out_shardings=shardings)()
        self._batch = _random_batch(config, call, layout.mesh)
        jitted = jax.jit(
            _CALLS[call](config, layout),
            out_shardings=(shardings, None) if self._trains else None,
            donate_argnums=0 if self._trains else (),
            compiler_options=compiling.options(),
        )
        with from_scratch():
            began = time.perf_counter()
            self._compiled = jitted.lower(self._state, self._batch).compile()
            self.compile_s = time.perf_counter() - began
        memory = self._compiled.memory_analysis()
        self.temp_mb = memory.temp_size_in_bytes / 1e6 if memory else None

    def __call__(self) -> float:
        """Run once; the seconds until all results are there."""
        began = time.perf_counter()
        result = jax.block_until_ready(self._compiled(self._state, self._batch))
        seconds = time.perf_counter() - began
        if self._trains:
            self._state = result[0]  # the old one was given away
        return seconds


@lru_cache(maxsize=4)
def _engine(model: ModelConfig, training: TrainingConfig, context: int) -> Engine:
    """An engine, kept: one whose state does not grow runs the same programs at every context."""
    network = jax.jit(lambda: MetaModel(model, key=jax.random.key(0)))()
    return Engine(network, training, context=context)


class EngineProgram:
    """Prefill or decoding of one configuration, by the engine, on one device."""

    def __init__(self, config: Config, call: str):
        """Compile, unless an earlier context has done so."""
        training, model = config.training, config.model
        self._sequences, self._context = training.global_batch_size, training.seq_length
        slots = self._context + 2 * CHUNK_OF_FULL_ATTENTION if mixers.grows(model) else 1
        # The engine reads neither of the two; without them, contexts share it.
        alike = replace(training, seq_length=1, global_batch_size=1)
        self._engine = engine = _engine(model, alike, slots)
        self.tokens: int | None = {
            "prefill": None,
            "decode": engine.chunk,
            "decode_between_steps": max(1, min(TOKENS_PER_CALL, engine.chunk - 2)),
        }[call]
        began = time.perf_counter()
        engine.compile(self._sequences, None if call == "prefill" else Sampling(), score=False)
        self.compile_s = time.perf_counter() - began
        memory = engine.memory(self._sequences, score=False)
        self.temp_mb = memory / 1e6 if memory else None
        rng = np.random.default_rng(training.data_seed)
        shape = (self._sequences, self._context)
        self._prompts = [*rng.integers(0, model.vocab_size, shape, dtype=np.int32)]

    def __call__(self) -> float:
        """Run once; the seconds until all results are there."""
        engine = self._engine
        if self.tokens is None:
            began = time.perf_counter()
            state, _ = engine.read(engine.start(self._sequences), self._prompts, score=False)
            jax.block_until_ready(state)
            return time.perf_counter() - began
        writing = engine.begin(engine.pretend(self._sequences, self._context))
        # Into the chunk: behind the step that is due first.
        writing, _, _ = engine.advance(writing, 1)
        jax.block_until_ready(writing)
        began = time.perf_counter()
        for first in range(0, self.tokens, TOKENS_PER_CALL):
            writing, _, _ = engine.advance(writing, min(TOKENS_PER_CALL, self.tokens - first))
        jax.block_until_ready(writing)
        return time.perf_counter() - began


type Program = BatchProgram | EngineProgram


def _initial(config: Config, call: str) -> PyTree:
    state = loop.init_state(config)
    return state if call == "train_step" else state.model


def _random_batch(config: Config, call: str, mesh: Mesh) -> Batch:
    """The host's part of [B, T], or of [accum, B/accum, T] for a training step."""
    training, vocab = config.training, config.model.vocab_size
    sequences = training.global_batch_size // jax.process_count()
    rng = np.random.default_rng([training.data_seed, jax.process_index()])
    tokens = rng.integers(0, vocab, (sequences, training.seq_length + 1))
    batch = from_tokens(tokens, config.model.bos_token_id)
    if call != "train_step":
        return shard_batch(mesh, batch)
    parts = jax.tree.map(lambda x: x.reshape(training.accum_steps, -1, x.shape[-1]), batch)
    return shard_batch(mesh, parts, batch_axis=1)


@contextmanager
def from_scratch() -> Generator[None]:
    """Nothing traced or compiled before is used again, in memory or on disk."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else JAX goes on as it did at the first compilation
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


# ---- side by side ------------------------------------------------------------------------


def measure(
    configs: Mapping[str, Config],
    call: str,
    *,
    warmup: int,
    repetitions: int,
    on_progress: Callable[[str], None],
) -> list[Timing]:
    """Time `call` of all variants in turns, at the contexts and batches of their configurations.

    The arguments of all variants are in memory together; one that finds no room becomes a failed
    timing. `on_progress` is called with a sentence for each step.
    """
    programs: dict[str, Program] = {}
    for name, config in configs.items():
        shape = f"{config.training.global_batch_size} x {config.training.seq_length} tokens"
        on_progress(f"{name}: {call} of {shape}, compiling …")
        kind = BatchProgram if call in BATCH_CALLS else EngineProgram
        if program := _unless_full(partial(kind, config, call)):
            programs[name] = program
            on_progress(f"{name}: compiled in {program.compile_s:.1f} s")
    # A variant must fit beside the others, so all are there before the first one runs.
    for _ in range(warmup):
        for name in tuple(programs):
            if _unless_full(programs[name]) is None:
                del programs[name]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for done in range(1, repetitions + 1):
        for name, program in programs.items():
            seconds[name].append(program())
        on_progress(f"{call}: round {done} of {repetitions}")
    return [
        _timed(name, call, config, programs[name], seconds[name])
        if name in programs
        else failed(name, call, config, "out of memory")
        for name, config in configs.items()
    ]


def _unless_full[R](work: Callable[[], R]) -> R | None:
    """The result of `work`; None where the memory does not suffice for it."""
    try:
        return work()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def failed(variant: str, call: str, config: Config, reason: str | None) -> Timing:
    """Of a variant that has no numbers."""
    training = config.training
    return Timing(variant, call, training.seq_length, training.global_batch_size, failed=reason)


def _timed(
    variant: str, call: str, config: Config, program: Program, seconds: Sequence[float]
) -> Timing:
    model, training = config.model, config.training
    if program.tokens:
        flops = None
    else:
        tokens = training.seq_length * training.global_batch_size
        flops = tokens * _flops_per_token(config, call)
    peak = peak_flops(jax.devices()[0].device_kind, model.compute_dtype)
    devices = jax.device_count() if call in BATCH_CALLS else 1
    return replace(
        failed(variant, call, config, None),
        seconds=tuple(seconds),
        compile_s=program.compile_s,
        temp_mb=program.temp_mb,
        flops=flops,
        mfu=flops / float(np.median(seconds)) / devices / peak if peak and flops else None,
        tokens=program.tokens,
        learns=training.train_mode == "meta",
        grows=mixers.grows(model),
    )


def _flops_per_token(config: Config, call: str) -> float:
    model, training = config.model, config.training
    if call in ("train_step", "gradient"):
        return model_flops(model, training).total
    score = call == "evaluate"
    return reading_flops(model, training.seq_length, learned(training), score=score).total
