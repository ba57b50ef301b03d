"""Compiled calls of several variants, timed in turns in one process.

A call reads a whole batch of random tokens: a training step, the outer gradient alone, prefill or
evaluation (`ttt.config.BenchmarkCalls`). Turns (A B A B ...) let the drift of a shared machine hit
all variants alike.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from ttt.bench import costs
from ttt.config import Config
from ttt.core import compiling, tree
from ttt.core.batch import AnyArray, Batch, from_tokens
from ttt.infra.mesh import replicate, shard_batch
from ttt.model import loop
from ttt.model.transformer import MetaModel, run_blocks


@dataclass(frozen=True)
class Result:
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
    """Memory of a device beside arguments and results; None where the backend does not tell."""
    flops: float | None = None
    """Of a call, as the mathematics needs them (`costs`, model FLOPs)."""
    mfu: float | None = None
    """Share of the devices' peak; None where that is unknown."""
    failed: str | None = None

    @property
    def median(self) -> float:
        """Seconds; NaN where there is none."""
        return float(np.median(self.seconds)) if self.seconds else math.nan

    @property
    def tokens_per_s(self) -> float:
        """Over all devices."""
        return self.context * self.sequences / self.median

    @property
    def s_per_1k_tokens(self) -> float:
        """Seconds for 1,000 tokens of throughput, as the paper's figures count."""
        return 1000 / self.tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the fields, the spread, and what follows from them."""
        if self.failed is not None:
            return {**self._what(), "failed": self.failed}
        low, q1, median, q3, high = np.quantile(self.seconds, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return {
            **self._what(),
            "step_s": median,
            "spread_s": {"min": low, "q1": q1, "q3": q3, "max": high},
            "seconds": list(self.seconds),
            "s_per_1k_tokens": self.s_per_1k_tokens,
            "tokens_per_s": self.tokens_per_s,
            "compile_s": self.compile_s,
            "temp_mb": self.temp_mb,
            "flops": self.flops,
            "mfu": self.mfu,
        }

    def _what(self) -> dict[str, Any]:
        names = ("variant", "call", "context", "sequences")
        return {name: getattr(self, name) for name in names}


# ---- the calls -------------------------------------------------------------------------


def _gradient(config: Config) -> Callable[[MetaModel, Batch], tuple[Array, PyTree]]:
    training = config.training

    def gradient(model: MetaModel, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
        trained, frozen = eqx.partition(model, tree.select(model, training.spec_outer))

        def loss(trained: MetaModel) -> Float[Array, ""]:
            losses = loop.batch_losses(eqx.combine(trained, frozen), batch, training, 1.0)
            return jnp.mean(losses.loss)

        return jax.value_and_grad(loss)(trained)

    return gradient


def _prefill(config: Config) -> Callable[[MetaModel, Batch], Array]:
    training = config.training

    def read(model: MetaModel, ids: Int[AnyArray, " T"]) -> Float[Array, " V"]:
        lm, x = model.language_model, model.prefix(model.embed(ids))
        policy, chunk = config.model.remat_prefix, config.model.mini_batch_size
        x = run_blocks(lm.model.h.suffix_blocks, x, policy, chunk)
        last = lm.model.ln_f(x[-1:])
        return lm.table.astype(last.dtype) @ last[0]

    def prefill(model: MetaModel, batch: Batch) -> Array:
        if training.train_mode == "meta":  # every chunk must be scored to be learned from
            return loop.batch_losses(model, batch, training, 1.0).chunk_losses
        return jax.vmap(lambda ids: read(model, ids))(batch.inputs)

    return prefill


def _evaluate(config: Config) -> Callable[[MetaModel, Batch], tuple[Array, Array]]:
    def evaluate(model: MetaModel, batch: Batch) -> tuple[Array, Array]:
        losses = loop.batch_losses(model, batch, config.training, 1.0)
        return losses.loss, losses.token_nll

    return evaluate


_CALLS = {
    "train_step": lambda config: loop.make_train_step(config.training),
    "gradient": _gradient,
    "prefill": _prefill,
    "evaluate": _evaluate,
}


class Program:
    """One call, compiled for one configuration, with its arguments on the devices."""

    def __init__(self, config: Config, call: str, mesh: Mesh):
        """Compile. Raises jax.errors.JaxRuntimeError where memory does not suffice."""
        self._trains = call == "train_step"
        self._state = replicate(mesh, jax.jit(lambda: _initial(config, call))())
        self._batch = _random_batch(config, call, mesh)
        jitted = jax.jit(
            _CALLS[call](config),
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
    mesh: Mesh,
    *,
    warmup: int,
    repetitions: int,
    told: Callable[[str], None],
) -> list[Result]:
    """Time `call` of all variants in turns, at the contexts and batches of their configurations.

    The arguments of all variants are in memory together; one that finds no room becomes a failed
    result. `told` hears of the progress.
    """
    programs: dict[str, Program] = {}
    for name, config in configs.items():
        told(f"{name}: {call} of {_shape(config)}, compiling …")
        if program := _unless_full(lambda config=config: Program(config, call, mesh)):
            programs[name] = program
            told(f"{name}: compiled in {program.compile_s:.1f} s")
    # A variant must fit beside the others, so all are there before the first one runs.
    for _ in range(warmup):
        for name in tuple(programs):
            if _unless_full(programs[name]) is None:
                del programs[name]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for done in range(1, repetitions + 1):
        for name, program in programs.items():
            seconds[name].append(program())
        told(f"{call}: round {done} of {repetitions}")
    return [
        _result(name, call, config, programs[name], seconds[name])
        if name in programs
        else failed(name, call, config, "out of memory")
        for name, config in configs.items()
    ]


def failed(variant: str, call: str, config: Config, reason: str) -> Result:
    """The result of a variant that has no numbers."""
    training = config.training
    return Result(variant, call, training.seq_length, training.global_batch_size, failed=reason)


def _shape(config: Config) -> str:
    return f"{config.training.global_batch_size} x {config.training.seq_length} tokens"


def _unless_full[R](work: Callable[[], R]) -> R | None:
    """The result of `work`; None where the memory does not suffice for it."""
    try:
        return work()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _result(
    variant: str, call: str, config: Config, program: Program, seconds: Sequence[float]
) -> Result:
    training = config.training
    tokens = training.seq_length * training.global_batch_size
    flops = tokens * _flops_per_token(config, call)
    peak = costs.peak_flops(jax.devices()[0].device_kind, config.model.compute_dtype)
    speed = flops / float(np.median(seconds)) / jax.device_count()
    return Result(
        *(variant, call, training.seq_length, training.global_batch_size),
        seconds=tuple(seconds),
        compile_s=program.compile_s,
        temp_mb=program.temp_mb,
        flops=flops,
        mfu=speed / peak if peak else None,
    )


def _flops_per_token(config: Config, call: str) -> float:
    model, training = config.model, config.training
    if call in ("train_step", "gradient"):
        return costs.model_flops(model, training).total
    learned = training.spec_inner if training.train_mode == "meta" else ()
    score = call == "evaluate"
    return costs.reading_flops(model, training.seq_length, learned, score=score).total
