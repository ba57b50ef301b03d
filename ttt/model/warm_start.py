"""A model that goes on from a parent of another kind: full attention → sliding window → TTT-E2E.

Attention has the same weights in all of them, and up to a window of tokens the same function. What
is new are the prime MLPs. A block adds post'(prime(pre'(h))) to the stream, and post' normalises:
whatever the prime MLP puts out, however small, comes out of it as large as post's gain. So a zero
down-projection is no gentle start: its output is zero, but the normalisation's slope there is
1/√eps, a thousandfold, and the first inner step ends the parent's function (docs/warm_start.md has
the candidates and what became of them).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttt.model.transformer import Block, MetaModel

SMALL_GAIN = 0.1
PRESERVING = ("zero_down", "zero_gain", "copy", "inherit")
"""Ways to begin that leave the function as it was, as long as no inner step is taken."""


def initialise_prime(model: MetaModel, how: str) -> MetaModel:
    """`model` with its prime MLPs begun as `how` says (`ttt.config.PRIME_INITS`).

    model: fresh prime MLPs, all else from the parent.
    """
    blocks = model.language_model.model.h.suffix_blocks
    begun = jax.vmap(INITS[how])(blocks)
    return eqx.tree_at(lambda m: m.language_model.model.h.suffix_blocks, model, begun)


def _random(block: Block) -> Block:
    """As in pretraining: the prime MLP speaks at full strength, and says nothing of use."""
    return block


def _zero_down(block: Block) -> Block:
    return eqx.tree_at(lambda b: b.feed_forward_prime.w2.weight, block, replace_fn=jnp.zeros_like)


def _zero_gain(block: Block) -> Block:
    return _with_gain(block, 0.0)


def _small_gain(block: Block) -> Block:
    return _with_gain(block, SMALL_GAIN)


def _copy(block: Block) -> Block:
    """The block's own MLP twice, the prime one silent."""
    return _with_gain(
        eqx.tree_at(
            lambda b: (b.feed_forward_prime, b.ffn_prime_norm),
            block,
            (block.feed_forward, block.ffn_norm),
        ),
        0.0,
    )


def _inherit(block: Block) -> Block:
    """The parent's MLP becomes the prime one, and a new, silent MLP takes its place."""
    moved = eqx.tree_at(
        lambda b: (
            b.feed_forward_prime,
            b.ffn_prime_norm,
            b.ffn_prime_post_norm,
            b.feed_forward,
            b.ffn_norm,
        ),
        block,
        (
            block.feed_forward,
            block.ffn_norm,
            block.ffn_post_norm,
            block.feed_forward_prime,
            block.ffn_prime_norm,
        ),
    )
    return eqx.tree_at(lambda b: b.ffn_post_norm.weight, moved, replace_fn=jnp.zeros_like)


def _with_gain(block: Block, gain: float) -> Block:
    return eqx.tree_at(
        lambda b: b.ffn_prime_post_norm.weight, block, replace_fn=lambda x: jnp.full_like(x, gain)
    )


INITS: dict[str, Callable[[Block], Block]] = {
    "random": _random,
    "zero_down": _zero_down,
    "zero_gain": _zero_gain,
    "small_gain": _small_gain,
    "copy": _copy,
    "inherit": _inherit,
}


# ---- narrower MLPs ---------------------------------------------------------------------


def narrow(parent: MetaModel, ids: Int[np.ndarray, "N T"], width: int) -> dict[str, np.ndarray]:
    """The parent's MLPs with the `width` units that matter most: published name -> array.

    The output that an MLP has on the tokens `ids` shall change least in the mean square, where the
    units that stay take over what the others did as far as they can (optimal brain surgeon,
    Hassibi and Stork 1993, for whole units).
    """
    stacks = parent.language_model.model.h
    layers = [_layers(blocks) for blocks in (stacks.prefix_blocks, stacks.suffix_blocks)]
    x = jax.vmap(parent.embed)(ids)
    parts: dict[str, list[np.ndarray]] = {"w1": [], "w2": [], "w3": []}
    for block in [block for stack in layers for block in stack]:
        x, gram = _through(block, x)
        mlp = block.feed_forward
        w1, w2, w3 = (np.asarray(w.weight, np.float64) for w in (mlp.w1, mlp.w2, mlp.w3))
        kept, down = fewer_units(np.asarray(gram, np.float64), w2, width)
        parts["w1"].append(w1[:, kept])
        parts["w2"].append(down)
        parts["w3"].append(w3[:, kept])
    prefix = "language_model.model.h.blocks.feed_forward"
    return {f"{prefix}.{w}.weight": np.stack(x).astype(np.float32) for w, x in parts.items()}


def fewer_units(
    gram: Float[np.ndarray, "F F"], down: Float[np.ndarray, "F D"], width: int
) -> tuple[Int[np.ndarray, " width"], Float[np.ndarray, "width D"]]:
    """Which units stay, ascending, and the down-projection that makes the best of them.

    gram: mean products of the units' activations.
    """
    kept, left = np.arange(len(down)), down
    for count in np.linspace(len(down), width, _ROUNDS + 1).round().astype(int)[1:]:
        # After the best refit, losing unit i costs |w_i|² / (G⁻¹)_ii; in rounds, so that of two
        # units that say the same one stays.
        inverse = np.linalg.inv(_damped(gram, kept))
        cost = np.sum(left**2, axis=1) / np.diag(inverse)
        kept = np.sort(kept[np.argsort(-cost, kind="stable")[:count]])
        # The damping holds what is kept near its own weights, where the tokens say nothing.
        pull = _damped(gram, kept) - gram[np.ix_(kept, kept)]
        left = np.linalg.solve(_damped(gram, kept), gram[kept] @ down + pull @ down[kept])
    return kept, left


_ROUNDS = 16
_DAMPING = 1e-4
"""Of the mean energy of a unit."""


def _damped(
    gram: Float[np.ndarray, "F F"], kept: Int[np.ndarray, " K"]
) -> Float[np.ndarray, "K K"]:
    own = gram[np.ix_(kept, kept)]
    return own + _DAMPING * np.mean(np.diag(gram)) * np.eye(len(kept))


def _layers(blocks: Block | None) -> list[Block]:
    if blocks is None:
        return []
    count = jax.tree.leaves(blocks)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count)]


@eqx.filter_jit
def _through(
    block: Block, x: Float[Array, "N T D"]
) -> tuple[Float[Array, "N T D"], Float[Array, "F F"]]:
    """The sequences after a block, and the mean products of its MLP's activations."""
    mixed = jax.vmap(block.mix)(x)
    normed = mixed if block.ffn_norm is None else block.ffn_norm(mixed)
    units = block.feed_forward.units(normed).reshape(-1, block.feed_forward.w2.weight.shape[0])
    units = units.astype(jnp.float32)
    gram = units.T @ units / units.shape[0]
    return jax.vmap(block.mlps)(mixed), gram
