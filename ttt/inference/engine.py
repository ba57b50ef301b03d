"""Reading and writing with a model that goes on learning while it does.

Tokens are read chunk by chunk, in constant memory. A chunk's loss needs the token behind its last
one, so its step is taken when that token is known, and before it is processed: the −log p of every
token is that of training, however the tokens came in.

Written tokens fill the room behind the caches one by one. Between two steps nothing is copied that
grows with the model, the window or the context.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ttt.config import ModelConfig, TrainingConfig
from ttt.core.precision import Precision, at_least_float32
from ttt.errors import UserError
from ttt.inference import state as states
from ttt.inference.sampling import Sampling, Values, choose
from ttt.inference.state import State
from ttt.model import inner_loop
from ttt.model.inner_loop import InnerRule
from ttt.model.layers import Embedding, Linear, RMSNorm, for_compute
from ttt.model.published import to_published
from ttt.model.transformer import (
    Block,
    MetaModel,
    chunk_loss,
    init_states,
    open_blocks,
    step_blocks,
)
from ttt.ops.cross_entropy import token_nll

# Tokens that full attention, which has no chunks of its own, reads at a time.
CHUNK_OF_FULL_ATTENTION = 512
# Chunks that one call of the compiled program reads, and tokens that one writes: enough to hide the
# call, few enough to hear of the progress.
_CHUNKS_PER_CALL = 16
TOKENS_PER_CALL = 64
_TOKENS_WHILE_TOLD = 8


class Written(NamedTuple):
    """What `Engine.write` wrote."""

    tokens: list[np.ndarray]
    """Of each sequence; a stop token is the last one."""
    nll: list[np.ndarray]
    """−log p of each, in nats, under the model itself: before penalty, temperature and cuts."""


class Layers(NamedTuple):
    """A network whose layers are apart: taking one out of a stack would copy it for every token."""

    wte: Embedding
    prefix: tuple[Block, ...]
    suffix: tuple[Block, ...]
    ln_f: RMSNorm
    lm_head: Linear | None


class Writing(NamedTuple):
    """A state in the middle of a chunk, with all that the next token needs; given away with use.

    What belongs to one sequence alone has no leading axis where there is but one: under an axis of
    length 1, XLA copied every cache for every token.
    """

    state: State
    """Without its mixer states, which lie in the rooms."""
    prefix: tuple[PyTree, ...]
    """Rooms, layer by layer."""
    suffix: tuple[PyTree, ...]
    x: Float[Array, "*B C D"]
    """The open chunk after the prefix."""
    fast: Layers
    """The fast weights, layer by layer, in the compute dtype."""
    stopped: Bool[Array, " B"]


class Engine:
    """Reads prompts into states, and writes on from them."""

    def __init__(
        self, model: MetaModel, training: TrainingConfig, *, context: int, learn: bool = True
    ):
        """Bind to the parameters; nothing is compiled.

        context: most tokens of a sequence, written ones included; binding (and the size of the
            caches) under full attention alone.
        learn: take the test-time steps that a model of `train_mode` meta is trained for; at the
            full inner rate, as evaluation does.
        """
        if context < 1:
            raise UserError(f"context={context}: a sequence has at least one token; raise it")
        self.full_attention = model.config.seq_modeling_block == "self_attention"
        self.learns = learn and training.train_mode == "meta"
        self.chunk = model.config.mini_batch_size
        if self.full_attention:
            self.chunk = min(CHUNK_OF_FULL_ATTENTION, context)
        self.context = context
        self.config: ModelConfig = model.config
        self._training = training
        self._model = model
        self._dtype = Precision.of(model.config).compute
        self._wide = at_least_float32(jnp.zeros((), self._dtype)).dtype  # of logits and −log p
        reader = model.reading(self.chunk)
        if self.learns:
            self._fast, slow = reader.fast_weights(training.spec_inner)
        else:
            self._fast, slow = eqx.partition(reader, False)
        self._slow = for_compute(slow, self._dtype)
        inner = training.optimizer_inner
        self._rate, self._clip = inner.lr, inner.clip_gradient
        self._read = jax.jit(self._read_chunks, donate_argnums=1, static_argnums=4)
        self._rest = jax.jit(self._read_rest, static_argnums=4)
        self._open = jax.jit(self._open_chunk)
        self._write = jax.jit(self._write_tokens, donate_argnums=1, static_argnums=8)
        self._end = jax.jit(self._end_chunk)

    # ---- states --------------------------------------------------------------------------

    def start(self, sequences: int) -> State:
        """The state of so many sequences before their first token."""
        return jax.jit(self._fresh, static_argnums=1)(self._fast_and_slow(), sequences)

    def pretend(self, sequences: int, tokens: int) -> State:
        """A state as large as after `tokens` tokens, all zeros: for timings, nothing else."""
        self._check_room(tokens, "the context")
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
        state = jax.eval_shape(lambda: self._fresh(self._fast_and_slow(), sequences))
        ids = jax.ShapeDtypeStruct((sequences, _CHUNKS_PER_CALL * self.chunk + 1), jnp.int32)
        counts = jax.ShapeDtypeStruct((sequences,), jnp.int32)
        compiled = self._read.lower(self._slow, state, ids, counts, score).compile()
        found = compiled.memory_analysis()
        return found.temp_size_in_bytes + states.size_in_bytes(state) if found else None

    def steps(self, state: State) -> Int[np.ndarray, " B"]:
        """Test-time steps that each sequence has taken."""
        taken = (np.asarray(state.seen) - np.asarray(state.open)) // self.chunk
        return taken if self.learns else np.zeros_like(taken)

    def save(self, path: Any, state: State, about: dict[str, Any] | None = None) -> int:
        """`ttt.inference.state.save_state` under this model's fingerprint."""
        return states.save_state(path, state, self.fingerprint, about)

    def load(self, path: Any) -> State:
        """`ttt.inference.state.load_state` for this model."""
        like = jax.eval_shape(lambda: self._fresh(self._fast_and_slow(), 1))
        return states.load_state(path, like, self.fingerprint)

    def learned(self, state: State, row: int = 0) -> MetaModel:
        """The model with the fast weights that a sequence has come to, in their own dtype."""
        if not self.learns:
            return self._model
        like, slow = self._model.fast_weights(self._training.spec_inner)
        fast = [leaf[row] for leaf in jax.tree.leaves(state.fast)]
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(like), fast), slow)

    def compile(
        self, sequences: int, sampling: Sampling | None = None, *, score: bool = True
    ) -> None:
        """Make the programs for so many sequences ready: of reading, and of writing if asked for.

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
        if self.full_attention:
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
        told: Callable[[int], None] | None = None,
    ) -> tuple[State, list[Float[np.ndarray, " N"]]]:
        """Continue each sequence with its own tokens, of any lengths.

        Returns the new state and, sequence by sequence, −log p in nats of every token read, given
        all before it and learned from them; the very first token of a sequence has none. Without
        `score` a model that does not learn skips them, and they are not meaningful.
        told: hears how many of the longest sequence's tokens are read.
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
        for first in range(0, longest, _CHUNKS_PER_CALL):
            now = np.clip(counts - first, 0, _CHUNKS_PER_CALL).astype(np.int32)
            start, width = first * self.chunk, _CHUNKS_PER_CALL * self.chunk + 1
            tokens = _padded([piece[start:] for piece in pieces], width)
            state, nll = self._read(self._slow, state, tokens, now, score)
            scores.append(nll)
            if told is not None:
                jax.block_until_ready(nll)
                told(min(first + _CHUNKS_PER_CALL, longest) * self.chunk)
        rest = [piece[count * self.chunk :] for piece, count in zip(pieces, counts, strict=True)]
        ids = _padded(rest, self.chunk)
        sizes = np.array([len(part) for part in rest], np.int32)
        logits, nll = self._rest(self._slow, state, ids, sizes, score)
        scores_host = [np.asarray(part) for part in scores]
        last = np.asarray(nll)
        found = []
        for row, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            whole = [part[row] for part in scores_host]
            read = np.concatenate([*whole, last[:0, 0]])[: count * self.chunk]
            read = np.concatenate([read, last[row, : max(sizes[row] - 1, 0)]])
            found.append(read[max(int(before[row]) - 1, 0) :][: len(piece)])
        new = np.array([len(prompt) for prompt in prompts], np.int32)
        state = state._replace(
            ids=jnp.asarray(ids),
            open=jnp.asarray(sizes),
            seen=state.seen + new,
            occurred=jnp.asarray(occurred),
            logits=logits,
        )
        if told is not None:
            told(max(len(piece) for piece in pieces))
        return state, found

    def check(self, state: State, prompts: Sequence[Int[np.ndarray, " T"]], tokens: int) -> None:
        """Raise what `read` of the prompts, and then `write` of so many tokens, would raise."""
        for row, piece in enumerate(self._pieces(state, prompts)):
            before = int(state.seen[row]) - int(state.open[row])
            self._check_room(before + len(piece) + tokens, f"prompt {row} with what is to come")

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
            self._check_room(int(state.seen[row]) + len(prompt), f"prompt {row}")
            pieces.append(piece)
        return pieces

    def _check_ids(self, ids: np.ndarray, what: str) -> None:
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise UserError(
                f"{what} has the id {int(wrong[0])}, and the vocabulary has ids 0 to "
                f"{self.config.vocab_size - 1}: use the tokenizer that the model was trained with"
            )

    def _check_room(self, tokens: int, what: str) -> None:
        if self.full_attention and tokens > self.context:
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
        told: Callable[[list[np.ndarray]], None] | None = None,
    ) -> tuple[State, Written]:
        """Continue each sequence by up to `tokens` tokens, fewer where a stop token is written.

        seed: draws depend on it, on the number of the sequence in the batch and on the position.
        given: what to write in place of choosing, as far as it goes (teacher forcing).
        told: hears what each sequence has got since the last call.
        Raises UserError before the first token of a sequence, for a bad `sampling`, ids outside the
        vocabulary, and more tokens than the context of full attention has places for.
        """
        stops = self._stops(stop)
        writing = self.begin(state)
        for row, seen in enumerate(np.asarray(state.seen)):
            self._check_room(int(seen) + tokens, f"sequence {row}")
        sequences = len(state.open)
        given = given or [np.zeros(0, np.int32)] * sequences
        for row, ids in enumerate(given):
            self._check_ids(np.asarray(ids), f"given text {row}")
        forced = _padded(given, max(tokens, 1), fill=-1)
        per_call = TOKENS_PER_CALL if told is None else _TOKENS_WHILE_TOLD
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
            if told is not None:
                told([row[row >= 0] for row in written[-1]])
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
        """The state opened for writing: the open chunk is read once more into its room."""
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
        return self._slow, writing, self._layers, jnp.int32(tokens), given, *how

    def end(self, writing: Writing) -> State:
        """The state after all that was written."""
        return self._end(self._layers, writing)

    def _stops(self, ids: Collection[int]) -> Bool[Array, " V"]:
        wanted = np.array(sorted(ids), np.int64)
        self._check_ids(wanted, "the list of stop tokens")
        stops = np.zeros(self.config.vocab_size, bool)
        stops[wanted] = True
        return jnp.asarray(stops)

    # ---- compiled programs ---------------------------------------------------------------
    # `slow` is the model without its fast weights, in the compute dtype.

    def _fast_and_slow(self) -> tuple[MetaModel, MetaModel]:
        return self._fast, self._slow

    def _fresh(self, weights: tuple[MetaModel, MetaModel], sequences: int) -> State:
        fast, slow = weights
        stacks = slow.language_model.model.h
        whole = -(-self.context // self.chunk) * self.chunk

        def fresh(blocks: Block | None) -> PyTree:
            return init_states(blocks, whole, self._dtype)

        one = State(
            fast=fast,
            prefix=fresh(stacks.prefix_blocks),
            suffix=fresh(stacks.suffix_blocks),
            ids=jnp.zeros(self.chunk, jnp.int32),
            open=jnp.zeros((), jnp.int32),
            seen=jnp.zeros((), jnp.int32),
            occurred=jnp.zeros(self.config.vocab_size, bool),
            logits=jnp.zeros(self.config.vocab_size, self._wide),
        )
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (sequences, *leaf.shape)), one)

    def _rule(self) -> InnerRule:
        return InnerRule(self._rate, self._clip)

    def _learn(
        self,
        slow: MetaModel,
        fast: MetaModel,
        suffix: PyTree,
        x: Float[Array, "C D"],
        targets: Int[Array, " C"],
    ) -> tuple[MetaModel, PyTree, Float[Array, " C"]]:
        """The step of training on one chunk: (fast weights, suffix states, −log p)."""
        piece = (x, targets, targets != self.config.bos_token_id)
        fast, suffix, outcome = inner_loop.learn(
            chunk_loss, fast, slow, suffix, piece, self._rule()
        )
        return fast, suffix, outcome.aux

    def _read_chunk(
        self,
        slow: MetaModel,
        fast: MetaModel,
        prefix: PyTree,
        suffix: PyTree,
        tokens: Int[Array, " C_and_1"],
        score: bool,
    ) -> tuple[MetaModel, PyTree, PyTree, Float[Array, " C"]]:
        """One chunk of one sequence, and the step on it."""
        model = eqx.combine(fast, slow)
        stacks = model.language_model.model.h
        ids, targets = tokens[:-1], tokens[1:]
        prefix, x = step_blocks(stacks.prefix_blocks, prefix, model.embed(ids), "none")
        if self.learns:
            fast, suffix, nll = self._learn(slow, fast, suffix, x, targets)
        elif score:
            suffix, nll = model.step(suffix, x, targets)
        else:
            suffix, _ = step_blocks(stacks.suffix_blocks, suffix, x, "none")
            nll = jnp.zeros(len(ids), self._wide)
        return fast, prefix, suffix, nll

    def _read_chunks(
        self,
        slow: MetaModel,
        state: State,
        tokens: Int[Array, "B N"],
        counts: Int[Array, " B"],
        score: bool,
    ) -> tuple[State, Float[Array, "B N"]]:
        """The next `counts` chunks of each sequence, of at most `_CHUNKS_PER_CALL`."""
        sequences, chunk = tokens.shape[0], self.chunk

        def one(fast: MetaModel, prefix: PyTree, suffix: PyTree, tokens: Array) -> tuple:
            return self._read_chunk(slow, fast, prefix, suffix, tokens, score)

        def body(i: Int[Array, ""], carry: tuple) -> tuple:
            *old, nll = carry
            piece = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk + 1, axis=1)
            *new, scores = _over(one, sequences)(*old, _lanes(piece))
            scores = _rows(scores, sequences)
            nll = jax.lax.dynamic_update_slice_in_dim(nll, scores, i * chunk, axis=1)
            # A single sequence comes here with a chunk to read.
            new = new if sequences == 1 else _where(i < counts, new, old)
            return (*new, nll)

        nll = jnp.zeros((sequences, tokens.shape[1] - 1), self._wide)
        carry = (*_lanes((state.fast, state.prefix, state.suffix)), nll)
        *lanes, nll = jax.lax.fori_loop(0, jnp.max(counts), body, carry)
        fast, prefix, suffix = _rows(tuple(lanes), sequences)
        return state._replace(fast=fast, prefix=prefix, suffix=suffix), nll

    def _read_rest(
        self,
        slow: MetaModel,
        state: State,
        ids: Int[Array, "B C"],
        sizes: Int[Array, " B"],
        score: bool,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B C"]]:
        """The open chunk, of which the first `sizes` tokens are there: (next logits, −log p)."""

        def one(
            fast: MetaModel, prefix: PyTree, suffix: PyTree, ids: Array, size: Array
        ) -> tuple[Array, Array]:
            model = eqx.combine(fast, slow)
            lm, stacks = model.language_model, model.language_model.model.h
            _, x = step_blocks(stacks.prefix_blocks, prefix, model.embed(ids), "none")
            _, x = step_blocks(stacks.suffix_blocks, suffix, x, "none")
            hidden = lm.model.ln_f(x)
            nll = jnp.zeros(len(ids), self._wide)
            if score or self.learns:
                following = jnp.concatenate([ids[1:], ids[:1]])
                nll = token_nll(hidden, lm.table, following, block=self.config.loss_block)
            last = jax.lax.dynamic_slice_in_dim(hidden, size - 1, 1)
            return _logits(lm.table, last), nll

        sequences = len(sizes)
        rows = (state.fast, state.prefix, state.suffix, ids, sizes)
        return _rows(_over(one, sequences)(*_lanes(rows)), sequences)

    @cached_property
    def _layers(self) -> Layers:
        return jax.jit(self._apart)(self._slow)

    def _apart(self, model: MetaModel) -> Layers:
        """The parts of a network, or of a partition of one, layer by layer."""
        lm = for_compute(model, self._dtype).language_model
        stacks, config = lm.model.h, self.config
        suffix = config.suffix_len
        return Layers(
            wte=lm.model.wte,
            prefix=_unstacked(stacks.prefix_blocks, config.num_hidden_layers - suffix),
            suffix=_unstacked(stacks.suffix_blocks, suffix),
            ln_f=lm.model.ln_f,
            lm_head=lm.lm_head,
        )

    def _open_chunk(self, slow: MetaModel, state: State) -> Writing:
        def one(
            fast: MetaModel, prefix: PyTree, suffix: PyTree, ids: Array
        ) -> tuple[PyTree, PyTree, Array, Layers]:
            model = eqx.combine(fast, slow)
            stacks = model.language_model.model.h
            prefix, x = open_blocks(stacks.prefix_blocks, prefix, model.embed(ids))
            suffix, _ = open_blocks(stacks.suffix_blocks, suffix, x)
            config = self.config
            return (
                _unstacked(prefix, config.num_hidden_layers - config.suffix_len),
                _unstacked(suffix, config.suffix_len),
                x,
                self._apart(fast),
            )

        rows = (state.fast, state.prefix, state.suffix, state.ids)
        opened = _over(one, len(state.open))(*_lanes(rows))
        stopped = jnp.zeros(len(state.open), bool)
        return Writing(state._replace(prefix=None, suffix=None), *opened, stopped)

    def _end_chunk(self, layers: Layers, writing: Writing) -> State:
        def one(prefix: tuple, suffix: tuple) -> tuple[PyTree, PyTree]:
            return _stacked(_closed(layers.prefix, prefix, 0)), _stacked(
                _closed(layers.suffix, suffix, 0)
            )

        sequences = len(writing.stopped)
        lanes = _over(one, sequences)(writing.prefix, writing.suffix)
        prefix, suffix = _rows(lanes, sequences)
        return writing.state._replace(prefix=prefix, suffix=suffix)

    def _write_tokens(
        self,
        slow: MetaModel,
        writing: Writing,
        layers: Layers,
        tokens: Int[Array, ""],
        given: Int[Array, "B N"],
        key: PRNGKeyArray,
        values: Values,
        stops: Bool[Array, " V"],
        kind: tuple[bool, bool, bool, bool],
    ) -> tuple[Writing, Int[Array, "B N"], Float[Array, "B N"]]:
        """Up to `tokens` tokens: stretches of single tokens, and a step where a chunk is full.

        Two nested loops instead of a branch for every token: a branch would hand the caches
        through, and might copy them.
        """
        sequences = given.shape[0]
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(sequences))

        def chosen(state: State, i: Int[Array, ""]) -> Int[Array, " B"]:
            def one(logits: Array, occurred: Array, key: PRNGKeyArray, seen: Array) -> Array:
                return choose(logits, occurred, jax.random.fold_in(key, seen), values, kind)

            free = jax.vmap(one)(state.logits, state.occurred, keys, state.seen)
            forced = jax.lax.dynamic_index_in_dim(given, i, axis=1, keepdims=False)
            return jnp.where(forced >= 0, forced, free)

        def due(writing: Writing) -> Bool[Array, " B"]:
            return ~writing.stopped & (writing.state.open == self.chunk)

        def goes_on(loop: tuple) -> Bool[Array, ""]:
            return (loop[2] < tokens) & ~jnp.all(loop[0].stopped)

        def token(loop: tuple) -> tuple:
            writing, pending, i, ids, nll = loop
            active = ~writing.stopped
            scores = _nll(writing.state.logits, pending)
            ids = _column(ids, jnp.where(active, pending, -1), i)
            nll = _column(nll, scores, i)
            writing = self._put(layers, writing, pending, stops)
            after = jnp.minimum(i + 1, given.shape[1] - 1)
            return writing, chosen(writing.state, after), i + 1, ids, nll

        def stretch(loop: tuple) -> tuple:
            writing, pending, *rest = loop
            full = due(writing)
            writing = jax.lax.cond(
                jnp.any(full),
                lambda writing: self._close_chunk(slow, layers, writing, pending, full),
                lambda writing: writing,
                writing,
            )
            return jax.lax.while_loop(
                lambda loop: goes_on(loop) & ~jnp.any(due(loop[0])),
                token,
                (writing, pending, *rest),
            )

        zero = jnp.zeros((), jnp.int32)
        ids = jnp.full(given.shape, -1, jnp.int32)
        nll = jnp.zeros(given.shape, writing.state.logits.dtype)
        loop = (writing, chosen(writing.state, zero), zero, ids, nll)
        writing, _, _, ids, nll = jax.lax.while_loop(goes_on, stretch, loop)
        return writing, ids, nll

    def _put(
        self, layers: Layers, writing: Writing, ids: Int[Array, " B"], stops: Bool[Array, " V"]
    ) -> Writing:
        """One token more of every sequence that has not stopped."""

        def one(
            fast: Layers, prefix: tuple, suffix: tuple, x: Array, token: Array, place: Array
        ) -> tuple[tuple, tuple, Array, Array]:
            network = eqx.combine(fast, layers)
            row = network.wte(token[None], self._dtype)
            row, prefix = _put_blocks(network.prefix, row, prefix, place)
            x = jax.lax.dynamic_update_slice_in_dim(x, row, place, axis=0)
            row, suffix = _put_blocks(network.suffix, row, suffix, place)
            head = network.lm_head
            table = network.wte.weight if head is None else head.weight.T
            return prefix, suffix, x, _logits(table, network.ln_f(row))

        state, active = writing.state, ~writing.stopped
        # Of a sequence that has stopped, what is written here lies behind its last token.
        sequences = len(ids)
        prefix, suffix, x, logits = _over(one, sequences)(
            *(writing.fast, writing.prefix, writing.suffix, writing.x), *_lanes((ids, state.open))
        )
        logits = _rows(logits, sequences)
        step = active.astype(jnp.int32)
        rows = jnp.arange(sequences)
        place = jnp.minimum(state.open, self.chunk - 1)
        state = state._replace(
            ids=state.ids.at[rows, place].set(jnp.where(active, ids, state.ids[rows, place])),
            open=state.open + step,
            seen=state.seen + step,
            occurred=state.occurred.at[rows, ids].max(active),
            logits=_where(active, logits, state.logits),
        )
        return Writing(state, prefix, suffix, x, writing.fast, writing.stopped | stops[ids])

    def _close_chunk(
        self,
        slow: MetaModel,
        layers: Layers,
        writing: Writing,
        following: Int[Array, " B"],
        full: Bool[Array, " B"],
    ) -> Writing:
        """The step on the chunk of every sequence that is `full`, and an empty room behind it."""
        chunk = self.chunk

        def one(
            fast: MetaModel,
            apart: Layers,
            prefix: tuple,
            suffix: tuple,
            x: Array,
            ids: Array,
            following: Array,
        ) -> tuple[MetaModel, Layers, tuple, tuple]:
            prefix = _roomy(layers.prefix, _closed(layers.prefix, prefix, chunk), chunk)
            if not self.learns:
                closed = _closed(layers.suffix, suffix, chunk)
                return fast, apart, prefix, _roomy(layers.suffix, closed, chunk)
            targets = jnp.concatenate([ids[1:], following[None]])
            before = _stacked(_closed(layers.suffix, suffix, 0))
            fast, after, _ = self._learn(slow, fast, before, x, targets)
            after = _unstacked(after, len(suffix))
            return fast, self._apart(fast), prefix, _roomy(layers.suffix, after, chunk)

        state = writing.state
        old = (_lanes(state.fast), writing.fast, writing.prefix, writing.suffix)
        new = _over(one, len(full))(*old, writing.x, *_lanes((state.ids, following)))
        # A single sequence comes here with its chunk full.
        fast, apart, prefix, suffix = new if len(full) == 1 else _where(full, new, old)
        state = state._replace(fast=_rows(fast, len(full)), open=jnp.where(full, 0, state.open))
        return writing._replace(state=state, fast=apart, prefix=prefix, suffix=suffix)


# ---- small parts ---------------------------------------------------------------------------


def _over(function: Callable, sequences: int) -> Callable:
    """`function` of one sequence, of all lanes."""
    return function if sequences == 1 else jax.vmap(function)


def _lanes(rows: PyTree) -> PyTree:
    """What `_over` takes, from leaves [B, ...]."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[0] == 1 else leaf, rows)


def _rows(lanes: PyTree, sequences: int) -> PyTree:
    """The inverse of `_lanes`."""
    return jax.tree.map(lambda leaf: leaf[None], lanes) if sequences == 1 else lanes


def _where(rows: Bool[Array, " B"], new: PyTree, old: PyTree) -> PyTree:
    """`new` in the rows where it says so, else `old`."""

    def one(a: Array, b: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(one, new, old)


def _unstacked(tree: PyTree, layers: int) -> tuple[PyTree, ...]:
    if tree is None:
        return ()

    def layer(i: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[i], tree)

    return tuple(map(layer, range(layers)))


def _stacked(layers: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if layers else None


def _put_blocks(
    blocks: Sequence[Block], x: Float[Array, "1 D"], rooms: Sequence[PyTree], place: Int[Array, ""]
) -> tuple[Float[Array, "1 D"], tuple[PyTree, ...]]:
    after = []
    for block, room in zip(blocks, rooms, strict=True):
        x, room = block.put(x, room, place)
        after.append(room)
    return x, tuple(after)


def _closed(blocks: Sequence[Block], rooms: Sequence[PyTree], tokens: int) -> list[PyTree]:
    return [
        block.seq_modeling_block.close(room, tokens)
        for block, room in zip(blocks, rooms, strict=True)
    ]


def _roomy(blocks: Sequence[Block], states: Sequence[PyTree], tokens: int) -> tuple[PyTree, ...]:
    return tuple(
        block.seq_modeling_block.room(state, tokens)
        for block, state in zip(blocks, states, strict=True)
    )


def _logits(table: Float[Array, "V D"], hidden: Float[Array, "1 D"]) -> Float[Array, " V"]:
    # Not `hidden @ table.T`: that transposed the whole table in memory for every token.
    return at_least_float32(jnp.einsum("vd,d->v", table.astype(hidden.dtype), hidden[0]))


def _nll(logits: Float[Array, "B V"], ids: Int[Array, " B"]) -> Float[Array, " B"]:
    picked = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _column(array: Array, values: Array, i: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, values[:, None], i, axis=1)


def _padded(
    pieces: Sequence[Sequence[int] | np.ndarray], width: int, fill: int = 0
) -> Int[np.ndarray, "B N"]:
    """The first `width` ids of each piece, [B, width], `fill` behind them."""
    out = np.full((len(pieces), width), fill, np.int32)
    for row, piece in zip(out, pieces, strict=True):
        row[: min(len(piece), width)] = piece[:width]
    return out
