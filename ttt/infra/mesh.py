"""Data parallelism: one mesh axis over all devices, sequences divided among them."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ttt.errors import UserError

DATA_AXIS = "data"


def data_mesh() -> Mesh:
    """All devices of all processes along the axis `data`."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def check_divides(mesh: Mesh, sequences: int) -> None:
    """Raise a UserError unless every device gets the same number of sequences."""
    devices = mesh.shape[DATA_AXIS]
    if sequences % devices:
        raise UserError(
            f"{sequences} sequences cannot be divided evenly among {devices} devices: make the "
            f"batch (global_batch_size / accum_steps, or eval_batch_size) a multiple of {devices}"
        )


def shard_batch(
    mesh: Mesh, host_batch: PyTree[np.ndarray], batch_axis: int = 0
) -> PyTree[jax.Array]:
    """Global arrays, divided along `batch_axis`, from each process's part of a batch.

    The global axis is as many times longer as there are processes.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, DATA_AXIS))

    def shard(part: np.ndarray) -> jax.Array:
        shape = list(part.shape)
        shape[batch_axis] *= jax.process_count()
        check_divides(mesh, shape[batch_axis])
        return jax.make_array_from_process_local_data(sharding, part, tuple(shape))

    return jax.tree.map(shard, host_batch)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Every array of `tree` whole on every device; other leaves as they are.

    All processes pass the same values.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: (
            jax.device_put(leaf, whole) if isinstance(leaf, jax.Array | np.ndarray) else leaf
        ),
        tree,
    )
