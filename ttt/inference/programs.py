"""What the engine compiles: reading by chunks, writing by tokens, and the step on a full chunk.

Everywhere `slow` is the model without its fast weights, its matrices in the compute dtype and its
layers one by one: taking a layer out of a stack would copy it for every token. What belongs to one
sequence alone stands in lanes: leaves [B, ...], and [...] where there is but one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ttt.core.precision import Precision, at_least_float32
from ttt.inference.sampling import Values, choose
from ttt.inference.state import State
from ttt.knobs import ModelConfig, TrainingConfig
from ttt.model import inner_loop, stacks
from ttt.model.inner_loop import InnerRule
from ttt.model.layers import for_compute
from ttt.model.mixer import AbstractMixer
from ttt.model.stacks import Stack
from ttt.model.transformer import (
    MetaModel,
    chunk_loss,
    init_states,
    prefill_blocks,
    put_blocks,
    step_blocks,
)
from ttt.ops.cross_entropy import token_nll, whole_nll

# Tokens that the MLPs of a stretch take at once.
_PIECE = 512


class Writing(NamedTuple):
    """A state in the middle of a chunk, with all that the next token needs; given away with use.

    What belongs to one sequence alone has no leading axis where there is but one: under an axis of
    length 1, XLA copied every cache for every token.
    """

    state: State
    """Without its mixer states, which are opened."""
    prefix: Stack
    """Mixer states with the slots of the open chunk behind them, layer by layer."""
    suffix: Stack
    x: Float[Array, "*B C D"]
    """The open chunk after the prefix."""
    fast: MetaModel
    """The fast weights in the compute dtype."""
    stopped: Bool[Array, " B"]


class Programs:
    """Functions of arrays for one network, rule and chunk length, to be jitted."""

    def __init__(
        self, config: ModelConfig, training: TrainingConfig, *, context: int, learns: bool
    ):
        """config: as the model reads, `mini_batch_size` the tokens of a chunk."""
        self.config, self.context, self.learns = config, context, learns
        self.chunk = config.mini_batch_size
        self.slots = -(-context // self.chunk) * self.chunk
        """Places in a state that grows with the context: whole chunks."""
        inner = training.optimizer_inner
        self._rate, self._clip = inner.lr, inner.clip_gradient
        self._dtype = Precision.of(config).compute
        self._wide = at_least_float32(jnp.zeros((), self._dtype)).dtype  # of logits and −log p

    def fresh_state(self, weights: tuple[MetaModel, MetaModel], sequences: int) -> State:
        """Before the first token; weights: fast and slow."""
        fast, slow = weights
        blocks = slow.language_model.model.h
        one = State(
            fast=fast,
            prefix=init_states(blocks.prefix_blocks, self.slots, self._dtype),
            suffix=init_states(blocks.suffix_blocks, self.slots, self._dtype),
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
        batch = jax.tree.map(lambda leaf: leaf[None], (fast, suffix, piece))
        fast, suffix, outcome = inner_loop.learn(
            chunk_loss, batch[0], slow, *batch[1:], self._rule()
        )
        return jax.tree.map(lambda leaf: leaf[0], (fast, suffix, outcome.aux))

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
        blocks = model.language_model.model.h
        ids, targets = tokens[:-1], tokens[1:]
        prefix, x = step_blocks(blocks.prefix_blocks, prefix, model.embed(ids), "none")
        if self.learns:
            fast, suffix, nll = self._learn(slow, fast, suffix, x, targets)
        elif score:
            suffix, hidden = model.step(suffix, x)
            table = model.language_model.table
            nll = token_nll(hidden, table, targets, block=self.config.loss_block)
        else:
            suffix, _ = step_blocks(blocks.suffix_blocks, suffix, x, "none")
            nll = jnp.zeros(len(ids), self._wide)
        return fast, prefix, suffix, nll

    def read_chunks(
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

    def read_rest(
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
            lm, blocks = model.language_model, model.language_model.model.h
            _, x = step_blocks(blocks.prefix_blocks, prefix, model.embed(ids), "none")
            _, x = step_blocks(blocks.suffix_blocks, suffix, x, "none")
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

    def read_stretch(
        self, slow: MetaModel, state: State, tokens: Int[Array, "B N"], score: bool
    ) -> tuple[State, Float[Array, "B N"]]:
        """The first N − 1 tokens of every sequence at once, of a model that does not learn."""
        model, length = slow, tokens.shape[1] - 1  # nothing is fast
        lm, blocks = model.language_model, model.language_model.model.h

        piece = math.gcd(length, _PIECE)

        def one(ids: Int[Array, " T"]) -> tuple[PyTree, PyTree, Array]:
            x = model.embed(ids)
            prefix, x = prefill_blocks(blocks.prefix_blocks, x, self.slots, piece)
            suffix, x = prefill_blocks(blocks.suffix_blocks, x, self.slots, piece)
            return prefix, suffix, x

        prefix, suffix, x = _rows(_over(one, len(tokens))(_lanes(tokens[:, :-1])), len(tokens))
        nll = jnp.zeros((len(tokens), length), self._wide)
        if score:
            hidden = lm.model.ln_f(x)
            nll = whole_nll(hidden, lm.table, tokens[:, 1:], block=self.config.loss_block)
        return state._replace(prefix=prefix, suffix=suffix), nll

    def open_chunk(self, slow: MetaModel, state: State) -> Writing:
        """The open chunk read once more, into slots behind the states at its border."""

        def one(
            fast: MetaModel, prefix: Stack, suffix: Stack, ids: Array
        ) -> tuple[Stack, Stack, Array, MetaModel]:
            model = eqx.combine(fast, slow)
            blocks, start = model.language_model.model.h, jnp.zeros((), jnp.int32)
            prefix, x = put_blocks(
                blocks.prefix_blocks,
                _opened(blocks.prefix_blocks, prefix, self.chunk),
                model.embed(ids),
                start,
            )
            suffix = _opened(blocks.suffix_blocks, suffix, self.chunk)
            suffix, _ = put_blocks(blocks.suffix_blocks, suffix, x, start)
            return prefix, suffix, x, for_compute(fast, self._dtype)

        rows = (state.fast, state.prefix, state.suffix, state.ids)
        opened = _over(one, len(state.open))(*_lanes(rows))
        stopped = jnp.zeros(len(state.open), bool)
        return Writing(state._replace(prefix=None, suffix=None), *opened, stopped)

    def end_chunk(self, slow: MetaModel, writing: Writing) -> State:
        """The state at the border of the open chunk, whose tokens it remembers."""
        blocks = slow.language_model.model.h

        def one(prefix: Stack, suffix: Stack) -> tuple[Stack, Stack]:
            return _closed(blocks.prefix_blocks, prefix, 0), _closed(
                blocks.suffix_blocks, suffix, 0
            )

        sequences = len(writing.stopped)
        lanes = _over(one, sequences)(writing.prefix, writing.suffix)
        prefix, suffix = _rows(lanes, sequences)
        return writing.state._replace(prefix=prefix, suffix=suffix)

    def write_tokens(
        self,
        slow: MetaModel,
        writing: Writing,
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
            writing = self._put(slow, writing, pending, stops)
            after = jnp.minimum(i + 1, given.shape[1] - 1)
            return writing, chosen(writing.state, after), i + 1, ids, nll

        def stretch(loop: tuple) -> tuple:
            writing, pending, *rest = loop
            full = due(writing)
            writing = jax.lax.cond(
                jnp.any(full),
                lambda writing: self._close_chunk(slow, writing, pending, full),
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
        self, slow: MetaModel, writing: Writing, ids: Int[Array, " B"], stops: Bool[Array, " V"]
    ) -> Writing:
        """One token more of every sequence that has not stopped."""

        def one(
            fast: MetaModel, prefix: Stack, suffix: Stack, x: Array, token: Array, slot: Array
        ) -> tuple[Stack, Stack, Array, Array]:
            model = eqx.combine(fast, slow)
            lm, blocks = model.language_model, model.language_model.model.h
            prefix, row = put_blocks(blocks.prefix_blocks, prefix, model.embed(token[None]), slot)
            x = jax.lax.dynamic_update_slice_in_dim(x, row, slot, axis=0)
            suffix, row = put_blocks(blocks.suffix_blocks, suffix, row, slot)
            return prefix, suffix, x, _logits(lm.table, lm.model.ln_f(row))

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
        writing: Writing,
        following: Int[Array, " B"],
        full: Bool[Array, " B"],
    ) -> Writing:
        """The step on the chunk of every sequence that is `full`, and empty slots behind it."""
        chunk, blocks = self.chunk, slow.language_model.model.h

        def one(
            fast: MetaModel,
            used: MetaModel,
            prefix: Stack,
            suffix: Stack,
            x: Array,
            ids: Array,
            following: Array,
        ) -> tuple[MetaModel, MetaModel, Stack, Stack]:
            closed = _closed(blocks.prefix_blocks, prefix, chunk)
            prefix = _opened(blocks.prefix_blocks, closed, chunk)
            if self.learns:
                targets = jnp.concatenate([ids[1:], following[None]])
                before = _closed(blocks.suffix_blocks, suffix, 0)
                fast, closed, _ = self._learn(slow, fast, before, x, targets)
                used = for_compute(fast, self._dtype)
            else:
                closed = _closed(blocks.suffix_blocks, suffix, chunk)
            return fast, used, prefix, _opened(blocks.suffix_blocks, closed, chunk)

        state = writing.state
        old = (_lanes(state.fast), writing.fast, writing.prefix, writing.suffix)
        new = _over(one, len(full))(*old, writing.x, *_lanes((state.ids, following)))
        # A single sequence comes here with its chunk full.
        fast, used, prefix, suffix = new if len(full) == 1 else _where(full, new, old)
        state = state._replace(fast=_rows(fast, len(full)), open=jnp.where(full, 0, state.open))
        return writing._replace(state=state, fast=used, prefix=prefix, suffix=suffix)


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


def _closed(blocks: Stack, opened: Stack, tokens: int) -> Stack:
    """The mixers' states after the first `tokens` slots."""
    return _each_mixer(lambda mixer, state: mixer.close(state, tokens), blocks, opened)


def _opened(blocks: Stack, states: Stack, slots: int) -> Stack:
    """The mixers' states with empty slots."""
    return _each_mixer(lambda mixer, state: mixer.open(state, slots), blocks, states)


def _each_mixer(
    function: Callable[[AbstractMixer, PyTree], PyTree], blocks: Stack, states: Stack
) -> Stack:
    return stacks.walk(
        blocks, None, lambda x, block, state: (x, function(block.seq_modeling_block, state)), states
    )[1]


def _logits(table: Float[Array, "V D"], hidden: Float[Array, "1 D"]) -> Float[Array, " V"]:
    # Not `hidden @ table.T`: that transposed the whole table in memory for every token.
    return at_least_float32(jnp.einsum("vd,d->v", table.astype(hidden.dtype), hidden[0]))


def _nll(logits: Float[Array, "B V"], ids: Int[Array, " B"]) -> Float[Array, " B"]:
    picked = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _column(array: Array, values: Array, i: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, values[:, None], i, axis=1)
