"""What a block keeps for its backward pass, by name (`ttt.config.REMAT_POLICIES`)."""

from collections.abc import Callable

import jax


def remat[**P, R](function: Callable[P, R], policy: str) -> Callable[P, R]:
    """`function`, recomputed in the backward pass as `policy` says.

    `none` keeps every intermediate, `dots` keeps the products with weights, `block` keeps the
    inputs alone.
    """
    match policy:
        case "none":
            return function
        case "dots":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        case "block":
            keep = jax.checkpoint_policies.nothing_saveable
        case _:
            raise ValueError(f"remat policy {policy!r} is none of none, dots, block")
    # Every use is the body of a scan, where nothing can be merged with the forward pass: no barrier
    # is needed.
    return jax.checkpoint(function, policy=keep, prevent_cse=False)
