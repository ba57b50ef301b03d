"""Devices as a mesh `data` × `state`, and where on it every array lives.

Sequences are divided along `data`. Parameters and what has their shape (moments, gradients) follow
rules: a dotted glob of names, and the mesh axis, if any, that divides each of the LAST axes of the
arrays so named. So one rule serves a weight, a stack of them, and its moments.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Int, PyTree

from ttt.core.batch import AnyArray
from ttt.core.tree import named_leaves, with_leaves
from ttt.errors import UserError
from ttt.globs import matches

DATA_AXIS = "data"
STATE_AXIS = "state"

type Rule = tuple[str, tuple[str | None, ...]]
"""(glob, mesh axes of the last axes)."""

EVERYWHERE: tuple[Rule, ...] = (("**", ()),)
"""Every array whole on every device."""

_LARGE = 2**18
"""Numbers above which an array must have a rule."""


def device_mesh(state: int = 1) -> Mesh:
    """All devices of all processes, `state` of them to each place along `data`.

    Raises UserError unless `state` divides the devices of each process.
    """
    local = jax.local_device_count()
    if local % state:
        raise UserError(
            f"backend.state_parallel={state} does not divide the {local} devices of a process, "
            "which share the tensors of their sequences: choose a divisor"
        )
    shape = (jax.device_count() // state, state)
    return jax.make_mesh(shape, (DATA_AXIS, STATE_AXIS), axis_types=(AxisType.Auto,) * 2)


def check_divides(mesh: Mesh, sequences: int) -> None:
    """Raise a UserError unless every place along `data` gets the same number of sequences."""
    devices = mesh.shape[DATA_AXIS]
    if sequences % devices:
        raise UserError(
            f"{sequences} sequences cannot be divided evenly among {devices} devices: make the "
            f"batch (training.global_batch_size / accum_steps) a multiple of {devices}"
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


def divide_batch(mesh: Mesh, batch: PyTree[np.ndarray]) -> PyTree[jax.Array]:
    """Global arrays, divided along their first axis, from a batch that every process has whole."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))

    def divide(whole: np.ndarray) -> jax.Array:
        check_divides(mesh, len(whole))
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(divide, batch)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Every array of `tree` whole on every device; other leaves as they are.

    All processes pass the same values.
    """
    return Layout(mesh).place(tree)


def joined(parts: Sequence[AnyArray], order: Int[np.ndarray, " N"] | None = None) -> AnyArray:
    """Arrays one after another along the first axis, joined in host memory to be saved.

    order: of the joined rows; None: as they come.

    No device holds anything twice for it. Arrays that are divided among devices, each in the same
    way and not along the first axis, come back as a global array whose parts lie in the host memory
    of the devices' own processes; all others as NumPy. Under `jax.jit` this is `jnp.concatenate`.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(isinstance(part, Tracer) for part in parts):
        whole = jnp.concatenate(parts)
        return whole if order is None else whole[order]
    divided = [part for part in parts if isinstance(part, jax.Array)]
    if not isinstance(first, jax.Array) or first.is_fully_replicated:
        return _rows([np.asarray(part) for part in parts], order)
    in_host_memory = "pinned_host"
    pieces = [
        jax.device_put(
            _rows([np.asarray(shard.data) for shard in shards], order),
            SingleDeviceSharding(shards[0].device, memory_kind=in_host_memory),
        )
        for shards in zip(*(part.addressable_shards for part in divided), strict=True)
    ]
    return jax.make_array_from_single_device_arrays(
        (sum(len(part) for part in parts), *first.shape[1:]),
        first.sharding.with_memory_kind(in_host_memory),
        pieces,
    )


def _rows(parts: Sequence[np.ndarray], order: Int[np.ndarray, " N"] | None) -> np.ndarray:
    whole = np.concatenate(parts)
    return whole if order is None else whole[order]


@dataclass(frozen=True)
class Layout:
    """A mesh, and the rules by which arrays lie on it. Arrays without a rule lie everywhere."""

    mesh: Mesh
    rules: tuple[Rule, ...] = EVERYWHERE

    @property
    def data(self) -> int:
        """Places among which sequences are divided."""
        return self.mesh.shape[DATA_AXIS]

    def check(self, tree: PyTree, large: int = _LARGE) -> None:
        """Raise where rules and a tree of arrays (or shapes) do not fit, with every name.

        ValueError: a rule without an array, or an array of over `large` numbers without a rule;
        UserError: an axis that its devices cannot share evenly.
        """
        leaves = named_leaves(tree)
        faults = [
            f"the rule {glob} matches nothing"
            for glob, _ in self.rules
            if not any(matches(glob, name) for name in leaves)
        ]
        faults += [
            f"{name} {list(leaf.shape)} has no rule"
            for name, leaf in leaves.items()
            if math.prod(leaf.shape) > large and self._axes(name) is None
        ]
        if faults:
            raise ValueError("sharding: " + "; ".join(faults))
        uneven = [
            f"  {name}: axis {position} of {list(leaf.shape)} among {self.mesh.shape[axis]}"
            for name, leaf in leaves.items()
            for position, axis in enumerate(self.spec(name, len(leaf.shape)))
            if axis is not None and leaf.shape[position] % self.mesh.shape[axis]
        ]
        if uneven:
            listed = "\n".join(uneven)
            raise UserError(
                f"the devices cannot share these arrays evenly:\n{listed}\nTake another number of "
                "devices, a smaller backend.state_parallel, or backend.sharding=replicated"
            )

    def spec(self, name: str, axes: int) -> PartitionSpec:
        """How the array `name` of so many axes is divided."""
        last = self._axes(name) or ()
        return PartitionSpec(*[None] * (axes - len(last)), *last)

    def shardings(self, tree: PyTree) -> PyTree[NamedSharding]:
        """Of every array or shape of `tree`."""
        return self._map(tree, lambda spec: NamedSharding(self.mesh, spec))

    def data_specs(self, tree: PyTree) -> PyTree[PartitionSpec]:
        """How `tree` is divided along `data` alone, as `jax.shard_map` asks for it."""
        return self._map(tree, lambda spec: _along(spec, DATA_AXIS))

    def place(self, tree: PyTree) -> PyTree:
        """Arrays that every process has whole, as global ones; other leaves as they are."""

        def put(name: str, leaf: PyTree) -> PyTree:
            if not isinstance(leaf, jax.Array | np.ndarray):
                return leaf
            sharding = NamedSharding(self.mesh, self.spec(name, leaf.ndim))
            own = sharding.is_fully_addressable
            if isinstance(leaf, jax.Array) and (own or not leaf.is_fully_addressable):
                return jax.device_put(leaf, sharding)
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

        return with_leaves(tree, {name: put(name, x) for name, x in named_leaves(tree).items()})

    def whole(self, tree: PyTree) -> PyTree:
        """Inside `jax.shard_map` over `data`: arrays gathered from their parts along it.

        Its transpose sums gradients over the devices and leaves each its part.
        """

        def gather(part: jax.Array, spec: PartitionSpec) -> jax.Array:
            if DATA_AXIS not in spec:
                return part
            axis = spec.index(DATA_AXIS)
            along_state = _along(spec, STATE_AXIS)

            # With `state` left to the compiler, it would gather along that axis too.
            @partial(
                jax.shard_map,
                in_specs=along_state,
                out_specs=along_state,
                axis_names={STATE_AXIS},
                check_vma=False,
            )
            def gathered(part: jax.Array) -> jax.Array:
                return jax.lax.all_gather(part, DATA_AXIS, axis=axis, tiled=True)

            return gathered(part)

        return jax.tree.map(gather, tree, self._map(tree, lambda spec: spec))

    def mean_gradient(self, gradient: PyTree) -> PyTree:
        """Inside `jax.shard_map`: the mean over `data` of gradients with respect to parts.

        What was made by `whole` is summed already, and lies in parts.
        """

        def mean(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
            divided = DATA_AXIS in spec
            return leaf / self.data if divided else jax.lax.pmean(leaf, DATA_AXIS)

        return jax.tree.map(mean, gradient, self.data_specs(gradient))

    def _axes(self, name: str) -> tuple[str | None, ...] | None:
        return next((axes for glob, axes in self.rules if matches(glob, name)), None)

    def _map(self, tree: PyTree, function: Callable[[PartitionSpec], Any]) -> PyTree:
        leaves = named_leaves(tree).items()
        return with_leaves(
            tree, {name: function(self.spec(name, len(leaf.shape))) for name, leaf in leaves}
        )


def _along(spec: PartitionSpec, axis: str) -> PartitionSpec:
    return PartitionSpec(*(name if name == axis else None for name in spec))
