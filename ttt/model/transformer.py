"""The network: blocks, two stacks, the language model, and its loss, plain or while learning."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ttt import mixers
from ttt.core import tree
from ttt.core.batch import AnyArray, Batch
from ttt.core.precision import Precision
from ttt.core.remat import remat
from ttt.errors import UserError
from ttt.knobs import ModelConfig
from ttt.model import inner_loop, stacks
from ttt.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from ttt.model.mixer import AbstractMixer
from ttt.model.pattern import MAKERS
from ttt.model.stacks import Stack
from ttt.ops.cross_entropy import batch_nll, masked_mean, token_nll, whole_nll


class Block(eqx.Module):
    """Mixer, prime MLP (if any), MLP: each between its norms, each added to the stream."""

    seq_modeling_block: AbstractMixer
    feed_forward: SwiGLU
    seq_norm: RMSNorm | None
    seq_post_norm: RMSNorm | None
    ffn_norm: RMSNorm | None
    ffn_post_norm: RMSNorm | None
    feed_forward_prime: SwiGLU | None
    ffn_prime_norm: RMSNorm | None
    ffn_prime_post_norm: RMSNorm | None

    def __init__(self, config: ModelConfig, mixer: str, *, prime: bool, key: PRNGKeyArray):
        """mixer: a name in `ttt.mixers.MIXERS`."""
        mixer_key, mlp_key, prime_key = jax.random.split(key, 3)
        width, dtype = config.hidden_size, Precision.of(config).param

        def norm(present: bool) -> RMSNorm | None:
            return RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype) if present else None

        def mlp(key: PRNGKeyArray) -> SwiGLU:
            scale = config.initializer_range
            return SwiGLU(width, config.intermediate_size, scale=scale, dtype=dtype, key=key)

        self.seq_modeling_block = MAKERS[mixer](config, mixer_key)
        self.feed_forward = mlp(mlp_key)
        self.seq_norm, self.ffn_norm = norm(config.pre_norm), norm(config.pre_norm)
        self.seq_post_norm, self.ffn_post_norm = norm(config.post_norm), norm(config.post_norm)
        self.feed_forward_prime = mlp(prime_key) if prime else None
        self.ffn_prime_norm = norm(prime and config.pre_norm)
        self.ffn_prime_post_norm = norm(prime and config.post_norm)

    def mix(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The first half, whole sequence at once."""
        mixed = self.seq_modeling_block(_apply(self.seq_norm, x))
        return x + _apply(self.seq_post_norm, mixed)

    def mix_step(self, x: Float[Array, "C D"], state: PyTree) -> tuple[Array, PyTree]:
        """The first half of the next C tokens, with the mixer's state."""
        state, mixed = self.seq_modeling_block.step(state, _apply(self.seq_norm, x))
        return x + _apply(self.seq_post_norm, mixed), state

    def prefill(self, x: Float[Array, "T D"], context: int) -> tuple[Array, PyTree]:
        """The first half of the first T tokens, and the mixer's state after them."""
        state, mixed = self.seq_modeling_block.prefill(_apply(self.seq_norm, x), context)
        return x + _apply(self.seq_post_norm, mixed), state

    def put(
        self, x: Float[Array, "N D"], opened: PyTree, slot: Int[Array, ""]
    ) -> tuple[Array, PyTree]:
        """N tokens in the slots from `slot` on behind the mixer's state."""
        opened, mixed = self.seq_modeling_block.put(opened, _apply(self.seq_norm, x), slot)
        return self.mlps(x + _apply(self.seq_post_norm, mixed)), opened

    def mlps(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The second half, token by token."""
        if self.feed_forward_prime is not None:
            fast = self.feed_forward_prime(_apply(self.ffn_prime_norm, x))
            x = x + _apply(self.ffn_prime_post_norm, fast)
        slow = self.feed_forward(_apply(self.ffn_norm, x))
        return x + _apply(self.ffn_post_norm, slow)


def _apply(norm: RMSNorm | None, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    return x if norm is None else norm(x)


class Stacks(eqx.Module):
    """Two stacks of blocks: what runs over whole sequences, and what can run chunk by chunk."""

    prefix_blocks: Stack
    suffix_blocks: Stack

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        keys, names = jax.random.split(key, config.num_hidden_layers), mixers.layer_types(config)
        first_suffix = config.num_hidden_layers - config.suffix_len

        def stack(part: slice, prime: bool) -> Stack:
            def block(mixer: str, key: PRNGKeyArray) -> Block:
                return Block(config, mixer, prime=prime, key=key)

            return stacks.make(block, names[part], keys[part])

        self.prefix_blocks = stack(slice(first_suffix), prime=False)
        self.suffix_blocks = stack(slice(first_suffix, None), prime=config.prime)


type Gather = Callable[[PyTree], PyTree]
"""Makes a part of the model whole where devices share its weights, when it is used."""


def as_it_is(part: PyTree) -> PyTree:
    """The `Gather` of a model that is whole."""
    return part


def run_blocks(
    blocks: Stack, x: Float[Array, "T D"], policy: str, chunk: int, gather: Gather = as_it_is
) -> Float[Array, "T D"]:
    """The whole sequence through a stack of blocks, one after the other made whole."""

    def whole(x: Float[Array, "T D"], block: Block, state: None) -> tuple[Array, None]:
        block = gather(block)
        return block.mlps(block.mix(x)), state

    def halves(x: Float[Array, "T D"], block: Block, state: None) -> tuple[Array, None]:
        block = gather(block)
        pieces = block.mix(x).reshape(-1, chunk, x.shape[-1])
        y = jax.lax.map(partial(remat(Block.mlps, policy), block), pieces)
        return y.reshape(x.shape), state

    # In halves, a backward pass never has the intermediates of attention and of an MLP at once, and
    # those of the MLP for one chunk only; remat is not nested, so nothing runs a third time.
    one = halves if policy == "chunk" else whole
    return stacks.walk(blocks, x, one, policy=policy)[0]


def step_blocks(
    blocks: Stack, states: Stack, x: Float[Array, "C D"], policy: str
) -> tuple[Stack, Float[Array, "C D"]]:
    """The next C tokens through a stack of blocks."""

    def whole(x: Float[Array, "C D"], block: Block, state: PyTree) -> tuple[Array, PyTree]:
        x, state = block.mix_step(x, state)
        return block.mlps(x), state

    def halves(x: Float[Array, "C D"], block: Block, state: PyTree) -> tuple[Array, PyTree]:
        x, state = remat(Block.mix_step, policy)(block, x, state)
        return remat(Block.mlps, policy)(block, x), state

    if policy == "chunk":
        x, states = stacks.walk(blocks, x, halves, states)
    else:
        x, states = stacks.walk(blocks, x, whole, states, policy=policy)
    return states, x


def prefill_blocks(
    blocks: Stack, x: Float[Array, "T D"], context: int, chunk: int
) -> tuple[Stack, Float[Array, "T D"]]:
    """The first T tokens, whole chunks of them, and the states after them."""

    def one(x: Float[Array, "T D"], block: Block, state: None) -> tuple[Array, PyTree]:
        x, state = block.prefill(x, context)
        # The MLPs' units of all tokens at once would take more memory than all else.
        pieces = x.reshape(-1, chunk, x.shape[-1])
        return jax.lax.map(block.mlps, pieces).reshape(x.shape), state

    x, states = stacks.walk(blocks, x, one)
    return states, x


def put_blocks(
    blocks: Stack, opened: Stack, x: Float[Array, "N D"], slot: Int[Array, ""]
) -> tuple[Stack, Float[Array, "N D"]]:
    """N tokens through a stack of blocks, into the slots from `slot` on."""
    x, opened = stacks.walk(blocks, x, lambda x, block, state: block.put(x, state, slot), opened)
    return opened, x


def init_states(blocks: Stack, context: int, dtype: jnp.dtype) -> Stack:
    """The mixer states of a stack of blocks before a sequence of at most `context` tokens."""
    return stacks.each(lambda block: block.seq_modeling_block.init_state(context, dtype), blocks)


class Decoder(eqx.Module):
    """Embedding, blocks, final norm."""

    wte: Embedding
    h: Stacks
    ln_f: RMSNorm


class CausalLM(eqx.Module):
    """The decoder and its head; with tied embeddings there is no head of its own."""

    model: Decoder
    lm_head: Linear | None

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        wte_key, blocks_key, head_key = jax.random.split(key, 3)
        width, dtype = config.hidden_size, Precision.of(config).param
        scale, vocab = config.initializer_range, config.vocab_size
        wte = Embedding(vocab, width, scale=scale, dtype=dtype, key=wte_key)
        ln_f = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)
        self.model = Decoder(wte, Stacks(config, key=blocks_key), ln_f)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else Linear(width, vocab, scale=scale, dtype=dtype, key=head_key)
        )

    @property
    def table(self) -> Float[Array, "V D"]:
        """One row per token, whose product with a final hidden state is the token's logit."""
        return self.model.wte.weight if self.lm_head is None else self.lm_head.weight.T


class Learning(NamedTuple):
    """How the model learns while it reads."""

    spec_inner: tuple[str, ...]
    """Dotted globs of the fast weights."""
    rule: inner_loop.InnerRule
    group: int = 1
    """Chunks that share one stored carry in the backward pass."""
    gradient: str = "forward_over_reverse"
    """Which form of the second-order gradient (`ttt.knobs.INNER_GRADIENTS`)."""


class SequenceLoss(NamedTuple):
    """The loss of each sequence and what it is made of."""

    loss: Float[Array, "*B"]
    """Mean over chunks, in nats per token."""
    chunk_losses: Float[Array, "*B N"]
    token_nll: Float[Array, "*B T"]
    """−log p of every target, masked or not."""
    gradient_norms: Float[Array, "*B N"]
    """Of the inner gradients, before clipping; zeros where nothing is learned."""


class MetaModel(eqx.Module):
    """A language model that can go on learning while it reads."""

    language_model: CausalLM
    config: ModelConfig = eqx.field(static=True)

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        self.language_model = CausalLM(config, key=key)
        self.config = config

    def embed(self, ids: Int[AnyArray, " T"]) -> Float[Array, "T D"]:
        """Token rows in the compute dtype."""
        return self.language_model.model.wte(ids, Precision.of(self.config).compute)

    def prefix(self, x: Float[Array, "T D"], gather: Gather = as_it_is) -> Float[Array, "T D"]:
        """The first L − S blocks."""
        blocks, config = self.language_model.model.h.prefix_blocks, self.config
        return run_blocks(blocks, x, config.remat_prefix, config.mini_batch_size, gather)

    def fast_weights(self, spec_inner: Sequence[str]) -> tuple["MetaModel", "MetaModel"]:
        """(fast, slow): the model parted by `spec_inner`, the fast weights in the state dtype.

        Only what is computed chunk by chunk can be fast: suffix blocks, final norm, own head.
        """
        mask = tree.select(self, spec_inner)
        chosen = [name for name, fast in tree.named_leaves(mask).items() if fast]
        late = ("suffix_blocks", "ln_f", "lm_head")
        early = [name for name in chosen if not set(late) & set(name.split("."))]
        if not chosen or early:
            matched = f"it matches {', '.join(early)}" if early else "it matches no parameter"
            raise UserError(
                f"training.spec_inner={list(spec_inner)}: {matched}; fast weights are parameters "
                "of the suffix blocks, ln_f or lm_head. The prime MLPs are "
                "'language_model.**.suffix_blocks.feed_forward_prime.**'."
            )
        fast, slow = eqx.partition(self, mask)
        return tree.cast(fast, Precision.of(self.config).state), slow

    def loss(self, batch: Batch, gather: Gather = as_it_is) -> SequenceLoss:
        """B sequences [B, T], plain (METHOD.md section 2)."""
        config, model = self.config, _gathered(self, gather, suffix=False)
        chunk, suffix = config.mini_batch_size, model.language_model.model.h.suffix_blocks

        def hidden(ids: Int[AnyArray, " T"]) -> Float[Array, "T D"]:
            x = model.prefix(model.embed(ids), gather)
            x = run_blocks(suffix, x, config.remat_prefix, chunk, gather)
            return model.language_model.model.ln_f(x)

        def windows(x: AnyArray) -> AnyArray:
            return x.reshape(len(x), -1, chunk)

        inputs = batch.inputs
        if mixers.windows_apart(config):
            inputs = inputs.reshape(-1, chunk)
        x = jax.vmap(hidden)(inputs).reshape(*batch.inputs.shape, -1)
        table = model.language_model.table
        nll = whole_nll(x, table, batch.targets, block=config.loss_block)
        losses = jax.vmap(jax.vmap(masked_mean))(windows(nll), windows(batch.loss_mask))
        return SequenceLoss(jnp.mean(losses, axis=1), losses, nll, jnp.zeros_like(losses))

    def loss_for_sequence(self, sequence: Batch, learning: Learning | None = None) -> SequenceLoss:
        """The loss of one sequence [T]: plain, or while learning from it."""
        batch = jax.tree.map(lambda x: x[None], sequence)
        losses = self.loss(batch) if learning is None else self.loss_while_learning(batch, learning)
        return jax.tree.map(lambda x: x[0], losses)

    def loss_while_learning(
        self, batch: Batch, learning: Learning, gather: Gather = as_it_is
    ) -> SequenceLoss:
        """B sequences [B, T], each learning chunk by chunk on its own (METHOD.md section 3)."""
        # The suffix is made whole once: every chunk needs it, and no chunk shall wait for others.
        model = _gathered(self, gather, suffix=True)
        fast, slow = model.fast_weights(learning.spec_inner)
        sequences, length = batch.inputs.shape
        x = jax.vmap(lambda ids: model.prefix(model.embed(ids), gather))(batch.inputs)
        pieces = jax.tree.map(self._chunks, (x, batch.targets, batch.loss_mask))

        def copies(x: Array) -> Array:
            return jnp.broadcast_to(x, (sequences, *x.shape))

        # The prefix has run; as a slow weight it would only cost a gradient of zeros per chunk.
        fast, slow = _without_prefix(fast), _without_prefix(slow)
        fast, states = jax.tree.map(copies, (fast, self.init_state(length)))
        _, _, read = inner_loop.read(
            chunk_loss,
            fast,
            slow,
            states,
            pieces,
            learning.rule,
            group=learning.group,
            gradient=learning.gradient,
        )
        chunk_losses = read.loss.T
        return SequenceLoss(
            jnp.mean(chunk_losses, axis=1),
            chunk_losses,
            jnp.swapaxes(read.aux, 0, 1).reshape(sequences, length),
            read.gradient_norm.T,
        )

    def _chunks(self, x: AnyArray) -> Array:
        """[B, T, ...] -> [N, B, C, ...]."""
        parts = x.reshape(x.shape[0], -1, self.config.mini_batch_size, *x.shape[2:])
        return jnp.swapaxes(parts, 0, 1)

    def with_config(self, config: ModelConfig) -> "MetaModel":
        """The same parameters under another configuration of the same shapes."""
        like = jax.eval_shape(lambda: MetaModel(config, key=jax.random.key(0)))
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(self))

    def unrolled(self) -> "MetaModel":
        """The same parameters with every layer on its own, to read and write token by token."""
        suffix = self.config.suffix_len
        counts = (self.config.num_hidden_layers - suffix, suffix)
        return self._with_stacks(map(stacks.unrolled, _stacks_of(self), counts))

    def restacked(self, like: "MetaModel") -> "MetaModel":
        """The inverse of `unrolled`, in the form of `like`; of parts of a model too."""
        layers = [() if stack is None else stack.rest for stack in _stacks_of(self)]
        whole = self._with_stacks(map(stacks.restacked, _stacks_of(like), layers))
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(whole))

    def _with_stacks(self, parts: Iterable[Stack]) -> "MetaModel":
        return eqx.tree_at(_stacks_of, self, list(parts), is_leaf=lambda x: x is None)

    def init_state(self, context: int) -> PyTree:
        """The suffix's mixer states before a sequence of at most `context` tokens."""
        blocks = self.language_model.model.h.suffix_blocks
        return init_states(blocks, context, Precision.of(self.config).compute)

    def step(self, states: PyTree, x: Float[Array, "C D"]) -> tuple[PyTree, Float[Array, "C D"]]:
        """The prefix's next C outputs through suffix and final norm: (states, hidden states)."""
        blocks = self.language_model.model.h.suffix_blocks
        states, x = step_blocks(blocks, states, x, self.config.remat_suffix)
        return states, self.language_model.model.ln_f(x)


def _stacks_of(model: MetaModel) -> list[Stack]:
    """Prefix and suffix."""
    blocks = model.language_model.model.h
    return [blocks.prefix_blocks, blocks.suffix_blocks]


def _gathered(model: MetaModel, gather: Gather, *, suffix: bool) -> MetaModel:
    """The model whole, except for the stacks that are gathered block by block."""

    def by_block(model: MetaModel) -> PyTree:
        return _stacks_of(model)[: 1 if suffix else 2]

    def is_none(leaf: PyTree) -> bool:
        return leaf is None

    parts = by_block(model)
    rest = gather(eqx.tree_at(by_block, model, [None] * len(parts), is_leaf=is_none))
    return eqx.tree_at(by_block, rest, parts, is_leaf=is_none)


def _without_prefix(model: MetaModel) -> MetaModel:
    return eqx.tree_at(
        lambda m: m.language_model.model.h.prefix_blocks, model, None, is_leaf=lambda x: x is None
    )


def chunk_loss(
    fast: MetaModel, slow: MetaModel, states: PyTree, piece: tuple[Array, Array, Array]
) -> tuple[Float[Array, " B"], tuple[PyTree, Float[Array, "B C"]]]:
    """The loss of a chunk of B sequences, as `inner_loop` asks for it; aux: token NLLs.

    piece: the prefix's outputs [B, C, D], targets and loss mask [B, C].
    """
    x, targets, mask = piece
    block = slow.config.loss_block

    def hidden(fast: MetaModel, states: PyTree, x: Array) -> tuple[PyTree, Array]:
        return eqx.combine(fast, slow).step(states, x)

    def own_nll(fast: MetaModel, hidden: Array, targets: Array) -> Array:
        table = eqx.combine(fast, slow).language_model.table
        return token_nll(hidden, table, targets, block=block)

    states, y = jax.vmap(hidden)(fast, states, x)
    head = fast.language_model.lm_head
    if head is None or head.weight is None:
        nll = batch_nll(y, slow.language_model.table, targets, block=block)
    else:  # a head that learns differs between sequences
        nll = jax.vmap(own_nll)(fast, y, targets)
    return jax.vmap(masked_mean)(nll, mask), (states, nll)
