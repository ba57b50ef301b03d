"""A model that goes on from a parent of another kind: full attention → sliding window → TTT-E2E.

Attention has the same weights in all of them, and up to a window of tokens the same function. What
is new are the prime MLPs. A block adds post'(prime(pre'(h))) to the stream, and post' normalises:
whatever the prime MLP puts out, however small, comes out of it as large as post's gain. So a zero
down-projection is no gentle start: its output is zero, but the normalisation's slope there is
1/√eps, a thousandfold, and the first inner step ends the parent's function. A zero gain is gentle
and deaf: no inner gradient passes it. What serves is to let the parent's own MLP be the prime one,
at its natural strength, and a new, silent MLP stand in its place: nothing changes, and what learns
is what has learned before (docs/warm_start.md: the candidates, and what became of them).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttt.core.precision import Precision
from ttt.model.transformer import Block, MetaModel

SMALL_GAIN = 0.1
PRESERVING = ("inherit", "copy", "zero_gain", "zero_down", "small_write")
"""Ways to begin that leave the function as it was, as long as no inner step is taken."""

_BLOCKS = "language_model.model.h.blocks"
_PRIME = "language_model.model.h.prime_storage"
_PARTS = {
    "feed_forward.w1": "feed_forward_prime.w1",
    "feed_forward.w2": "feed_forward_prime.w2",
    "feed_forward.w3": "feed_forward_prime.w3",
    "ffn_norm": "ffn_prime_norm",
    "ffn_post_norm": "ffn_prime_post_norm",
}
"""Static MLP -> prime MLP, with their norms."""


class Begun(NamedTuple):
    """A model whose prime MLPs have begun, and where its weights come from."""

    model: MetaModel
    initialised: tuple[str, ...]
    """Published names of what is new; `[-S:]`: in the last S layers."""
    moved: tuple[str, ...]
    """What serves in another place than in the parent: `from -> to`."""


def begin(model: MetaModel, how: str) -> Begun:
    """`model` with its prime MLPs begun as `how` says (`ttt.knobs.PRIME_INITS`).

    model: fresh prime MLPs, all else from the parent. Its suffix blocks are given away, so that no
        device holds them twice; the new ones lie where they lay.
    """
    blocks = jax.tree.map(jnp.asarray, model.language_model.model.h.suffix_blocks)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, blocks)
    begun = jax.jit(INITS[how], donate_argnums=0, out_shardings=shardings)(blocks)
    last = f"[-{jax.tree.leaves(blocks)[0].shape[0]}:]"
    present = [part for part in _PARTS if _part(blocks, part) is not None]
    taken = {
        f"{_BLOCKS}.{part}.weight{last}": f"{_PRIME}.{_PARTS[part]}.weight"
        for part in present
        if how == "inherit" or (how == "copy" and part != "ffn_post_norm")
    }
    new = [f"{_PRIME}.{_PARTS[part]}.weight" for part in present]
    if how == "inherit":
        new = list(taken)
    return Begun(
        eqx.tree_at(lambda m: m.language_model.model.h.suffix_blocks, model, begun),
        tuple(name for name in new if name not in taken.values()),
        tuple(f"{source} -> {target}" for source, target in taken.items()),
    )


def _random(block: Block) -> Block:
    """As in pretraining: the prime MLP speaks at full strength, and says nothing of use."""
    return block


def _zero_down(block: Block) -> Block:
    return eqx.tree_at(lambda b: b.feed_forward_prime.w2.weight, block, replace_fn=jnp.zeros_like)


def _zero_gain(block: Block) -> Block:
    return _with_gain(block, "feed_forward_prime", 0.0)


def _small_gain(block: Block) -> Block:
    return _with_gain(block, "feed_forward_prime", SMALL_GAIN)


def _small_write(block: Block) -> Block:
    """Says nothing before its first step, and little after it."""
    return _zero_down(_small_gain(block))


def _copy(block: Block) -> Block:
    """The block's own MLP twice, the prime one silent."""
    for part, prime in _PARTS.items():
        block = _put(block, prime, _part(block, part))
    return _with_gain(block, "feed_forward_prime", 0.0)


def _inherit(block: Block) -> Block:
    """The parent's MLP becomes the prime one, and a new, silent MLP takes its place."""
    swapped = block
    for part, prime in _PARTS.items():
        swapped = _put(swapped, prime, _part(block, part))
        swapped = _put(swapped, part, _part(block, prime))
    return _with_gain(swapped, "feed_forward", 0.0)


INITS: dict[str, Callable[[Block], Block]] = {
    "inherit": _inherit,
    "copy": _copy,
    "zero_gain": _zero_gain,
    "zero_down": _zero_down,
    "small_gain": _small_gain,
    "small_write": _small_write,
    "random": _random,
}


def _part(block: Block, name: str) -> Any:
    """The weight of an MLP's matrix or norm; None for a norm that is switched off."""
    part: Any = block
    for step in name.split("."):
        part = getattr(part, step)
    return None if part is None else part.weight


def _put(block: Block, name: str, weight: Array | None) -> Block:
    return block if weight is None else eqx.tree_at(lambda b: _part(b, name), block, weight)


def _with_gain(block: Block, mlp: str, gain: float) -> Block:
    """What `mlp` adds to the stream times `gain`, in the norm behind it or, without, in w2."""
    norm = {"feed_forward": "ffn_post_norm", "feed_forward_prime": "ffn_prime_post_norm"}[mlp]
    weight = _part(block, norm)
    if weight is not None:
        return _put(block, norm, jnp.full_like(weight, gain))
    return eqx.tree_at(lambda b: _part(b, f"{mlp}.w2"), block, replace_fn=lambda w: gain * w)


# ---- narrower MLPs ---------------------------------------------------------------------


def narrow(parent: MetaModel, ids: Int[np.ndarray, "N T"], width: int) -> dict[str, np.ndarray]:
    """The parent's MLPs with the `width` units that matter most: published name -> array.

    The output that an MLP has on the tokens `ids` shall change least in the mean square, where the
    units that stay take over what the others did as far as they can (optimal brain surgeon,
    Hassibi and Stork 1993, for whole units). One layer at a time is on a device.
    """
    stacks = parent.language_model.model.h
    layers = [_layers(blocks) for blocks in (stacks.prefix_blocks, stacks.suffix_blocks)]
    table = np.asarray(parent.language_model.model.wte.weight)
    x = jnp.asarray(table[ids]).astype(Precision.of(parent.config).compute)
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
