"""What a block keeps for its backward pass, by name (`ttt.knobs.REMAT_POLICIES`)."""

from collections.abc import Callable

import jax


def remat[**P, R](
    function: Callable[P, R], policy: str, *, prevent_cse: bool = False
) -> Callable[P, R]:
    """`function`, recomputed in the backward pass as `policy` says.

    What stays in memory: with `none` every intermediate, with `dots` the products with weights and
    the results of attention, with `attention` those results alone, with `block` the inputs alone.
    `chunk` is `block` for each half of a block on its own (model/transformer.py).
    prevent_cse: keep XLA from merging what is computed again with the forward pass; in the body of
        a scan it cannot.
    """
    # Named in ops/dot_attention.py, whose backward pass recomputes the scores anyway: without its
    # results kept, attention runs three times.
    attention = jax.checkpoint_policies.save_only_these_names("attention")
    match policy:
        case "none":
            return function
        case "dots":
            products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            keep = jax.checkpoint_policies.save_from_both_policies(products, attention)
        case "attention":
            keep = attention
        case "block" | "chunk":
            keep = jax.checkpoint_policies.nothing_saveable
        case _:
            raise ValueError(
                f"remat policy {policy!r} is none of none, dots, attention, block, chunk"
            )
    return jax.checkpoint(function, policy=keep, prevent_cse=prevent_cse)
