"""How parameters are divided among devices, as data (`ttt.infra.mesh.Rule`). No JAX.

Along `state` every product of a block is split as its neighbours need it: by columns into heads and
MLP units, then by rows back to the width, with one sum over devices behind each. Along `data`, with
`fsdp`, the other axis of each matrix is divided, for storage alone: it is whole where it is used.
"""

from math import prod

from ttt.globs import matches

_COLUMNS, _ROWS = ("data", "state"), ("state", "data")
_MATRICES = (
    *((f"**.{name}.weight", _COLUMNS) for name in ("wq", "wk", "wv", "w1", "w3")),
    *((f"**.{name}.weight", _ROWS) for name in ("wo", "w2")),
    ("**.wte.weight", (None, "data")),
)
_HEAD = ("**.lm_head.weight", ("data", None))


def rules(sharding: str, *, tied: bool) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """The rules of `backend.sharding` for a model whose embeddings are tied or not.

    Norm gains have none: they are small.
    """
    matrices = _MATRICES if tied else (*_MATRICES, _HEAD)
    if sharding == "fsdp":
        return matrices
    return tuple(
        (glob, tuple(None if axis == "data" else axis for axis in axes)) for glob, axes in matrices
    )


def shares(name: str, sharding: str, *, data: int, state: int) -> int:
    """Devices that a parameter is divided among."""
    sizes = {"data": data, "state": state, None: 1}
    for glob, axes in rules(sharding, tied=False):
        if matches(glob, name):
            return prod(sizes[axis] for axis in axes)
    return 1
