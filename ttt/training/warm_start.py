"""Warm starts into another kind of model: full attention → sliding window → TTT-E2E.

Attention keeps its weights, and up to a window of tokens its function; only the prime MLPs are new.
With post-norms, what a prime MLP adds is normalised first. So a zero down-projection is no gentle
start: the slope there is 1/√eps, and the first inner step changes the function. Behind a zero gain
no inner gradient passes. `inherit` lets the parent's MLP become the prime one, and a new MLP with
gain 0 takes its place: the function stays, and what learns is trained already. Without post-norms a
zero down-projection is silent and its inner gradient is finite: `copy` leaves the parent's MLP in
place and puts a silent copy of it before it (docs/warm_start.md compares all).
"""

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
_DOWN = "feed_forward_prime.w2"
_PRIME_GAINS = {"copy": 0.0, "zero_gain": 0.0, "small_gain": SMALL_GAIN, "small_write": SMALL_GAIN}


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
    begun = jax.jit(_begin, static_argnums=1, donate_argnums=0, out_shardings=shardings)(
        blocks, how
    )
    last = f"[-{jax.tree.leaves(blocks)[0].shape[0]}:]"
    present = [part for part in _PARTS if _part(blocks, part) is not None]
    # What silences a copy is not the parent's.
    silenced = "ffn_post_norm" if "ffn_post_norm" in present else "feed_forward.w2"
    taken = {
        f"{_BLOCKS}.{part}.weight{last}": f"{_PRIME}.{_PARTS[part]}.weight"
        for part in present
        if how == "inherit" or (how == "copy" and part != silenced)
    }
    new = [f"{_PRIME}.{_PARTS[part]}.weight" for part in present]
    if how == "inherit":
        new = list(taken)
    return Begun(
        eqx.tree_at(lambda m: m.language_model.model.h.suffix_blocks, model, begun),
        tuple(name for name in new if name not in taken.values()),
        tuple(f"{source} -> {target}" for source, target in taken.items()),
    )


def _begin(block: Block, how: str) -> Block:
    """A suffix block with its prime MLP begun; `random` leaves it as in pretraining."""
    parts = {name: _part(block, name) for pair in _PARTS.items() for name in pair}
    for part, prime in _PARTS.items():
        if how in ("copy", "inherit"):
            block = _put(block, prime, parts[part])
        if how == "inherit":
            block = _put(block, part, parts[prime])
    if how == "inherit":  # the parent's MLP is the prime one now, and the new one is silent
        return _with_gain(block, "feed_forward", 0.0)
    if how in _PRIME_GAINS:
        block = _with_gain(block, "feed_forward_prime", _PRIME_GAINS[how])
    if how in ("zero_down", "small_write"):
        block = _put(block, _DOWN, jnp.zeros_like(_part(block, _DOWN)))
    return block


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
    norm = "ffn_post_norm" if mlp == "feed_forward" else "ffn_prime_post_norm"
    weight = _part(block, norm)
    if weight is not None:
        return _put(block, norm, jnp.full_like(weight, gain))
    return _put(block, f"{mlp}.w2", gain * _part(block, f"{mlp}.w2"))


# ---- narrower MLPs ---------------------------------------------------------------------


def narrow(parent: MetaModel, ids: Int[np.ndarray, "N T"], width: int) -> dict[str, np.ndarray]:
    """The parent's MLPs with the `width` units that matter most: published name -> array.

    The output that an MLP has on the tokens `ids` shall change least in the mean square, where the
    units that stay take over what the others did as far as they can (optimal brain surgeon,
    Hassibi and Stork 1993, for whole units). One layer at a time is on a device.
    """
    stacks = parent.unrolled().language_model.model.h
    layers = [x for part in (stacks.prefix_blocks, stacks.suffix_blocks) if part for x in part.rest]
    table = np.asarray(parent.language_model.model.wte.weight)
    x = jnp.asarray(table[ids]).astype(Precision.of(parent.config).compute)
    parts: dict[str, list[np.ndarray]] = {"w1": [], "w2": [], "w3": []}
    for block in layers:
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
