"""Reading and writing with a model that goes on learning while it does.

Tokens are read chunk by chunk, in constant memory. A chunk's loss needs the token behind its last
one, so its step is taken when that token is known, and before it is processed: the −log p of every
token is that of training, however the tokens came in.

Written tokens fill slots behind the caches one by one. Between two steps nothing is copied that
grows with the model, the window or the context.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ttt import mixers
from ttt.core.precision import Precision
from ttt.errors import UserError
from ttt.inference import state as states
from ttt.inference.programs import Programs, Writing
from ttt.inference.sampling import Sampling
from ttt.inference.state import State
from ttt.knobs import ModelConfig, TrainingConfig
from ttt.model.layers import for_compute
from ttt.model.published import to_published
from ttt.model.transformer import MetaModel
from ttt.plan.memory import for_reading

# Tokens that full attention, which has no chunks of its own, reads at a time. What is left of a
# prompt costs a whole chunk, twice: as it is read, and as writing begins.
CHUNK_OF_FULL_ATTENTION = 128
# Chunks that one call of the compiled program reads, and tokens that one writes: enough to hide the
# call, few enough to hear of the progress.
_CHUNKS_PER_CALL = 16
TOKENS_PER_CALL = 64
_TOKENS_WHILE_SHOWN = 8


class Written(NamedTuple):
    """What `Engine.write` wrote."""

    tokens: list[np.ndarray]
    """Of each sequence; a stop token is the last one."""
    nll: list[np.ndarray]
    """−log p of each, in nats, under the model itself: before penalty, temperature and cuts."""


class Engine:
    """Reads prompts into states, and writes on from them."""

    def __init__(
        self, model: MetaModel, training: TrainingConfig, *, context: int, learn: bool = True
    ):
        """Bind to the parameters; nothing is compiled.

        context: most tokens of a sequence, written ones included; binding (and the size of the
            caches) where the state grows with the context, as under full attention.
        learn: take the test-time steps that a model of `train_mode` meta is trained for; at the
            full inner rate, as evaluation does.
        """
        if context < 1:
            raise UserError(f"context={context}: a sequence has at least one token; raise it")
        self.grows = mixers.grows(model.config)
        self.learns = learn and training.train_mode == "meta"
        self.chunk = model.config.mini_batch_size
        if mixers.windows_apart(model.config):
            self.chunk = min(CHUNK_OF_FULL_ATTENTION, context)
        self.context = context
        self.config: ModelConfig = model.config
        self._training = training
        self._model = model
        own = replace(model.config, mini_batch_size=self.chunk)
        config = for_reading(own, learns=self.learns)
        # The one copy of the weights that the engine makes, beside the caller's.
        self._fast, self._slow = jax.jit(self._parted)(model.with_config(config))
        inner = training.optimizer_inner
        self._rate, self._clip = inner.lr, inner.clip_gradient
        programs = Programs(config, training, context=context, learns=self.learns)
        self._programs = programs
        self._fresh = jax.jit(programs.fresh_state, static_argnums=1)
        self._read = jax.jit(programs.read_chunks, donate_argnums=1, static_argnums=4)
        self._stretch = jax.jit(programs.read_stretch, donate_argnums=1, static_argnums=3)
        self._rest = jax.jit(programs.read_rest, static_argnums=4)
        self._open = jax.jit(programs.open_chunk)
        self._write = jax.jit(programs.write_tokens, donate_argnums=1, static_argnums=7)
        self._end = jax.jit(programs.end_chunk)

    def _parted(self, model: MetaModel) -> tuple[MetaModel, MetaModel]:
        """(fast, slow) weights, layer by layer, in the dtypes that they are used in."""
        model = model.unrolled()
        if self.learns:
            fast, slow = model.fast_weights(self._training.spec_inner)
        else:
            fast, slow = eqx.partition(model, False)
        return fast, for_compute(slow, Precision.of(self.config).compute)

    # ---- states --------------------------------------------------------------------------

    def start(self, sequences: int) -> State:
        """The state of so many sequences before their first token."""
        return self._fresh(self._weights, sequences)

    def pretend(self, sequences: int, tokens: int) -> State:
        """A state as large as after `tokens` tokens, all zeros: for timings, nothing else."""
        self._check_context(tokens, "the context")
        opened = (tokens - 1) % self.chunk + 1
        state = self.start(sequences)

        def seen(cache: PyTree) -> PyTree:
            return jax.tree.map(
                lambda leaf: leaf + (tokens - opened) if leaf.dtype == jnp.int32 else leaf, cache
            )

        counts = jnp.ones(sequences, jnp.int32)
        return state._replace(
            prefix=seen(state.prefix),
            suffix=seen(state.suffix),
            open=counts * opened,
            seen=counts * tokens,
        )

    def memory(self, sequences: int, *, score: bool = True) -> int | None:
        """Bytes that reading so many sequences needs beside the parameters: states and work.

        None where the backend does not tell. Compiles the program of reading.
        """
        state = jax.eval_shape(lambda: self._programs.fresh_state(self._weights, sequences))
        ids = jax.ShapeDtypeStruct((sequences, _CHUNKS_PER_CALL * self.chunk + 1), jnp.int32)
        counts = jax.ShapeDtypeStruct((sequences,), jnp.int32)
        compiled = self._read.lower(self._slow, state, ids, counts, score).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + states.size_in_bytes(state) if memory else None

    def steps(self, state: State) -> Int[np.ndarray, " B"]:
        """Test-time steps that each sequence has taken."""
        taken = (np.asarray(state.seen) - np.asarray(state.open)) // self.chunk
        return taken if self.learns else np.zeros_like(taken)

    def save(self, path: Any, state: State, about: dict[str, Any] | None = None) -> int:
        """`ttt.inference.state.save_state` under this model's fingerprint."""
        return states.save_state(path, state, self.fingerprint, about)

    def load(self, path: Any) -> State:
        """`ttt.inference.state.load_state` for this model."""
        like = jax.eval_shape(lambda: self._programs.fresh_state(self._weights, 1))
        return states.load_state(path, like, self.fingerprint)

    def learned(self, state: State, row: int = 0) -> MetaModel:
        """The model with the fast weights that a sequence has come to, in their own dtype."""
        if not self.learns:
            return self._model
        own, slow = self._model.fast_weights(self._training.spec_inner)
        fast = jax.tree.map(lambda leaf: leaf[row], state.fast)
        return eqx.combine(fast.restacked(own), slow)

    def compile(
        self, sequences: int, sampling: Sampling | None = None, *, score: bool = True
    ) -> None:
        """Compile the programs for so many sequences: reading, and, with `sampling`, writing.

        Calls do it by themselves; this is for who wants to know the time of the work alone.
        """
        state = self.start(sequences)._replace(open=jnp.ones(sequences, jnp.int32))
        ids = np.zeros((sequences, _CHUNKS_PER_CALL * self.chunk + 1), np.int32)
        counts = np.zeros(sequences, np.int32)
        self._rest(self._slow, state, ids[:, : self.chunk], counts + 1, score)
        if sampling is not None:
            self.end(self.advance(self.begin(state), 0, sampling)[0])
        jax.block_until_ready(self._read(self._slow, state, ids, counts, score))

    @cached_property
    def fingerprint(self) -> str:
        """Of the parameters, the network and the rule of learning, in 16 hexadecimal digits."""
        digest = hashlib.sha256()
        how = ("attention", "attention_block", "loss_block", "remat_prefix", "remat_suffix", "name")
        settings = {k: v for k, v in asdict(self.config).items() if k not in how}
        if mixers.windows_apart(self.config):
            del settings["mini_batch_size"]
        rule = [self._rate, self._clip, self._training.spec_inner] if self.learns else None
        digest.update(json.dumps([settings, rule], sort_keys=True).encode())
        for name, array in sorted(to_published(self._model).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()[:16]

    # ---- reading -------------------------------------------------------------------------

    def read(
        self,
        state: State,
        prompts: Sequence[Int[np.ndarray, " T"]],
        *,
        score: bool = True,
        on_progress: Callable[[int], None] | None = None,
    ) -> tuple[State, list[Float[np.ndarray, " N"]]]:
        """Continue each sequence with its own tokens, of any lengths.

        Returns the new state and, sequence by sequence, −log p in nats of every token read, given
        all before it and learned from them; the very first token of a sequence has none. Without
        `score` a model that does not learn skips them, and they are not meaningful.
        on_progress: hears how many of the longest sequence's tokens are read.
        Raises UserError for ids outside the vocabulary, a sequence without a token, and one longer
        than the context of full attention.
        """
        pieces = self._pieces(state, prompts)
        counts = np.array([max(len(piece) - 1, 0) // self.chunk for piece in pieces], np.int32)
        before = np.asarray(state.open)
        occurred = np.array(state.occurred)
        for row, prompt in enumerate(prompts):
            occurred[row, np.asarray(prompt, np.int64)] = True
        # Given away below, so that memory holds it once; the caller's own stays whole.
        state = jax.tree.map(jnp.copy, state)
        scores: list[Array] = []
        longest = int(counts.max(initial=0))
        stretch = self._stretch_of(before, counts)
        if stretch:
            tokens = _padded(pieces, stretch * self.chunk + 1)
            state, nll = self._stretch(self._slow, state, tokens, score)
            scores.append(nll)
            if on_progress is not None:
                jax.block_until_ready(nll)
                on_progress(stretch * self.chunk)
        for first in range(stretch, longest, _CHUNKS_PER_CALL):
            now = np.clip(counts - first, 0, _CHUNKS_PER_CALL).astype(np.int32)
            start, width = first * self.chunk, _CHUNKS_PER_CALL * self.chunk + 1
            tokens = _padded([piece[start:] for piece in pieces], width)
            state, nll = self._read(self._slow, state, tokens, now, score)
            scores.append(nll)
            if on_progress is not None:
                jax.block_until_ready(nll)
                on_progress(min(first + _CHUNKS_PER_CALL, longest) * self.chunk)
        rest = [piece[count * self.chunk :] for piece, count in zip(pieces, counts, strict=True)]
        ids = _padded(rest, self.chunk)
        sizes = np.array([len(part) for part in rest], np.int32)
        logits, nll = self._rest(self._slow, state, ids, sizes, score)
        scores_host = [np.asarray(part) for part in scores]
        last = np.asarray(nll)
        nlls = []
        for row, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            whole = [part[row] for part in scores_host]
            read = np.concatenate([*whole, last[:0, 0]])[: count * self.chunk]
            read = np.concatenate([read, last[row, : max(sizes[row] - 1, 0)]])
            nlls.append(read[max(int(before[row]) - 1, 0) :][: len(piece)])
        new = np.array([len(prompt) for prompt in prompts], np.int32)
        state = state._replace(
            ids=jnp.asarray(ids),
            open=jnp.asarray(sizes),
            seen=state.seen + new,
            occurred=jnp.asarray(occurred),
            logits=logits,
        )
        if on_progress is not None:
            on_progress(max(len(piece) for piece in pieces))
        return state, nlls

    def _stretch_of(self, before: np.ndarray, counts: np.ndarray) -> int:
        """Chunks to read at once before all others.

        Where the state grows, a chunk costs the more the later it comes, and the platform's whole
        sequence attention is much faster than chunk by chunk against a cache. It starts at the
        sequence's start, with all sequences at once.
        """
        fresh = self.grows and not self.learns and not before.any()
        chunks = int(counts.min()) if fresh else 0
        return chunks if chunks > 1 else 0

    def check(self, state: State, prompts: Sequence[Int[np.ndarray, " T"]], tokens: int) -> None:
        """Raise what `read` of the prompts, and then `write` of so many tokens, would raise."""
        for row, piece in enumerate(self._pieces(state, prompts)):
            before = int(state.seen[row]) - int(state.open[row])
            self._check_context(before + len(piece) + tokens, f"prompt {row} with what is to come")

    def _pieces(self, state: State, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each sequence's tokens from the border of its open chunk on, checked."""
        if len(prompts) != len(state.open):
            raise UserError(f"{len(prompts)} prompts for a state of {len(state.open)} sequences")
        opened, ids = np.asarray(state.open), np.asarray(state.ids)
        pieces = []
        for row, prompt in enumerate(prompts):
            prompt = np.asarray(prompt, np.int64).reshape(-1)
            piece = np.concatenate([ids[row, : opened[row]], prompt]).astype(np.int32)
            if not len(piece):
                raise UserError(f"prompt {row} is empty: give it at least one token, such as BOS")
            self._check_ids(prompt, f"prompt {row}")
            self._check_context(int(state.seen[row]) + len(prompt), f"prompt {row}")
            pieces.append(piece)
        return pieces

    def _check_ids(self, ids: np.ndarray, what: str) -> None:
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise UserError(
                f"{what} has the id {int(wrong[0])}, and the vocabulary has ids 0 to "
                f"{self.config.vocab_size - 1}: use the tokenizer that the model was trained with"
            )

    def _check_context(self, tokens: int, what: str) -> None:
        if self.grows and tokens > self.context:
            raise UserError(
                f"{what} comes to {tokens} tokens, and full attention has caches for "
                f"context={self.context}: shorten it, or raise the context"
            )

    # ---- writing -------------------------------------------------------------------------

    def write(
        self,
        state: State,
        tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        *,
        seed: int = 0,
        stop: Collection[int] = (),
        given: Sequence[Int[np.ndarray, " T"]] | None = None,
        on_progress: Callable[[list[np.ndarray]], None] | None = None,
    ) -> tuple[State, Written]:
        """Continue each sequence by up to `tokens` tokens, fewer where a stop token is written.

        seed: draws depend on it, on the number of the sequence in the batch and on the position.
        given: what to write in place of choosing, as far as it goes (teacher forcing).
        on_progress: hears what each sequence has got since the last call.
        Raises UserError before the first token of a sequence, for a bad `sampling`, ids outside the
        vocabulary, and more tokens than the context of full attention has places for.
        """
        stops = self._stops(stop)
        writing = self.begin(state)
        for row, seen in enumerate(np.asarray(state.seen)):
            self._check_context(int(seen) + tokens, f"sequence {row}")
        sequences = len(state.open)
        given = given or [np.zeros(0, np.int32)] * sequences
        for row, ids in enumerate(given):
            self._check_ids(np.asarray(ids), f"given text {row}")
        forced = _padded(given, max(tokens, 1), fill=-1)
        per_call = TOKENS_PER_CALL if on_progress is None else _TOKENS_WHILE_SHOWN
        written: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        for first in range(0, tokens, per_call):
            count = min(per_call, tokens - first)
            now = forced[:, first : first + count]
            writing, ids, nll = self.advance(
                writing, count, sampling, seed=seed, stops=stops, forced=now
            )
            written.append(np.asarray(ids))
            scores.append(np.asarray(nll))
            if on_progress is not None:
                on_progress([row[row >= 0] for row in written[-1]])
            if stop and bool(np.all(np.asarray(writing.stopped))):
                break
        nothing = np.zeros((sequences, 0))
        ids = np.concatenate([nothing.astype(np.int32), *written], axis=1)
        nll = np.concatenate([nothing.astype(np.float32), *scores], axis=1)
        lengths = np.sum(ids >= 0, axis=1)
        return self.end(writing), Written(
            [row[:n] for row, n in zip(ids, lengths, strict=True)],
            [row[:n] for row, n in zip(nll, lengths, strict=True)],
        )

    def begin(self, state: State) -> Writing:
        """The state opened for writing: the open chunk is read once more into its slots."""
        if not np.all(np.asarray(state.open)):
            raise UserError("a sequence without a token cannot be continued: read a prompt first")
        return self._open(self._slow, state)

    def advance(
        self,
        writing: Writing,
        tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        *,
        seed: int = 0,
        stops: Bool[Array, " V"] | None = None,
        forced: Int[np.ndarray, "B N"] | None = None,
    ) -> tuple[Writing, Int[Array, "B N"], Float[Array, "B N"]]:
        """Up to 64 tokens more in one compiled call: ids (−1 after a stop) and their −log p.

        `writing` is given away and must not be used again.
        """
        if not 0 <= tokens <= TOKENS_PER_CALL:
            raise ValueError(f"tokens={tokens}: a call writes 0 to {TOKENS_PER_CALL}")
        sequences = len(writing.stopped)
        forced = np.zeros((sequences, 0), np.int32) if forced is None else forced
        arguments = self._arguments(writing, tokens, sampling, seed, stops, list(forced))
        writing, ids, nll = self._write(*arguments)
        return writing, ids[:, :tokens], nll[:, :tokens]

    def lower_write(self, writing: Writing) -> jax.stages.Lowered:
        """The program of `advance`, to look into."""
        nothing = [np.zeros(0, np.int32)] * len(writing.stopped)
        return self._write.lower(*self._arguments(writing, 0, Sampling(), 0, None, nothing))

    def _arguments(
        self,
        writing: Writing,
        tokens: int,
        sampling: Sampling,
        seed: int,
        stops: Bool[Array, " V"] | None,
        forced: Sequence[np.ndarray],
    ) -> tuple:
        sampling.check()
        stops = self._stops(()) if stops is None else stops
        how = (jax.random.key(seed), sampling.values(), stops, sampling.kind())
        given = _padded(forced, TOKENS_PER_CALL, -1)
        return self._slow, writing, jnp.int32(tokens), given, *how

    def end(self, writing: Writing) -> State:
        """The state after all that was written."""
        return self._end(self._slow, writing)

    def _stops(self, ids: Collection[int]) -> Bool[Array, " V"]:
        wanted = np.array(sorted(ids), np.int64)
        self._check_ids(wanted, "the list of stop tokens")
        stops = np.zeros(self.config.vocab_size, bool)
        stops[wanted] = True
        return jnp.asarray(stops)

    @property
    def _weights(self) -> tuple[MetaModel, MetaModel]:
        return self._fast, self._slow


def _padded(
    pieces: Sequence[Sequence[int] | np.ndarray], width: int, fill: int = 0
) -> Int[np.ndarray, "B N"]:
    """The first `width` ids of each piece, [B, width], `fill` behind them."""
    out = np.full((len(pieces), width), fill, np.int32)
    for row, piece in zip(out, pieces, strict=True):
        row[: min(len(piece), width)] = piece[:width]
    return out
