"""What the engine compiles: reading by chunks, writing by tokens, and the step on a full chunk.

Everywhere `slow` is the model without its fast weights, its matrices in the compute dtype. What
belongs to one sequence alone stands in lanes: leaves [B, ...], and [...] where there is but one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ttt.core.precision import Precision, at_least_float32
from ttt.inference.sampling import Values, choose
from ttt.inference.state import State
from ttt.knobs import ModelConfig, TrainingConfig
from ttt.model import inner_loop
from ttt.model.inner_loop import InnerRule
from ttt.model.layers import Embedding, Linear, RMSNorm, for_compute
from ttt.model.transformer import (
    Block,
    MetaModel,
    chunk_loss,
    init_states,
    open_blocks,
    step_blocks,
)
from ttt.ops.cross_entropy import token_nll


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


class Programs:
    """Functions of arrays for one network, rule and chunk length, to be jitted."""

    def __init__(
        self, config: ModelConfig, training: TrainingConfig, *, context: int, learns: bool
    ):
        """config: as the model reads, `mini_batch_size` the tokens of a chunk."""
        self.config, self.context, self.learns = config, context, learns
        self.chunk = config.mini_batch_size
        inner = training.optimizer_inner
        self._rate, self._clip = inner.lr, inner.clip_gradient
        self._dtype = Precision.of(config).compute
        self._wide = at_least_float32(jnp.zeros((), self._dtype)).dtype  # of logits and −log p

    def fresh_state(self, weights: tuple[MetaModel, MetaModel], sequences: int) -> State:
        """Before the first token; weights: fast and slow."""
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
        stacks = model.language_model.model.h
        ids, targets = tokens[:-1], tokens[1:]
        prefix, x = step_blocks(stacks.prefix_blocks, prefix, model.embed(ids), "none")
        if self.learns:
            fast, suffix, nll = self._learn(slow, fast, suffix, x, targets)
        elif score:
            suffix, hidden = model.step(suffix, x)
            table = model.language_model.table
            nll = token_nll(hidden, table, targets, block=self.config.loss_block)
        else:
            suffix, _ = step_blocks(stacks.suffix_blocks, suffix, x, "none")
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

    def apart(self, model: MetaModel) -> Layers:
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

    def open_chunk(self, slow: MetaModel, state: State) -> Writing:
        """The open chunk read once more, into its room."""

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
                self.apart(fast),
            )

        rows = (state.fast, state.prefix, state.suffix, state.ids)
        opened = _over(one, len(state.open))(*_lanes(rows))
        stopped = jnp.zeros(len(state.open), bool)
        return Writing(state._replace(prefix=None, suffix=None), *opened, stopped)

    def end_chunk(self, layers: Layers, writing: Writing) -> State:
        """The state at the border of the open chunk, whose tokens it remembers."""

        def one(prefix: tuple, suffix: tuple) -> tuple[PyTree, PyTree]:
            return _stacked(_closed(layers.prefix, prefix, 0)), _stacked(
                _closed(layers.suffix, suffix, 0)
            )

        sequences = len(writing.stopped)
        lanes = _over(one, sequences)(writing.prefix, writing.suffix)
        prefix, suffix = _rows(lanes, sequences)
        return writing.state._replace(prefix=prefix, suffix=suffix)

    def write_tokens(
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
            return fast, self.apart(fast), prefix, _roomy(layers.suffix, after, chunk)

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
