"""A foreign model's tensors -> arrays under published names, every tensor accounted for. No JAX.

Ours are [in, out] and rotate the dimensions 2i and 2i + 1 of a head together. A source that pairs i
with i + K/2 has the rows of queries and keys, their biases and the gains of their norms reordered,
head by head: the same function, to the bit.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ttt.errors import UserError
from ttt.interop import families
from ttt.interop.families import BLOCKS, HEAD, Facts, Part
from ttt.interop.sources import IGNORED, Source

MOST_LISTED = 10
"""Faults that a message names; it counts the others."""


@dataclass(frozen=True)
class AuditRow:
    """What became of one tensor."""

    source: str
    sha256: str
    """Of its bytes as they are stored."""
    dtype: str
    """As stored."""
    shape: tuple[int, ...]
    """[out, in], as the foreign program has it."""
    target: str
    """Published name, with `[layer]` for a layer's."""
    operation: str
    """What was done to its numbers, in order."""


def convert(
    source: Source, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[dict[str, np.ndarray], list[AuditRow]]:
    """All parameters in float32 by published name, and the audit, a row for each source tensor.

    Raises UserError, with all of them, for tensors that are missing, of another shape, unused or
    not finite. on_progress: hears how many tensors of how many are done.
    """
    facts = source.facts
    check_names(source)
    arrays: dict[str, np.ndarray] = {}
    audit: list[AuditRow] = []
    broken = []
    places = list(_places(facts))
    for done, (part, layer) in enumerate(places, 1):
        name = source.name_of(part, layer)
        row, array = _taken(source, part, layer, name)
        if not np.all(np.isfinite(array)):
            broken.append(name)
        audit.append(row)
        if layer is None:
            arrays[part.target] = array
        else:
            target = BLOCKS + part.target
            if target not in arrays:
                shape = (facts.num_hidden_layers, *array.shape)
                arrays[target] = np.empty(shape, np.float32)
            arrays[target][layer] = array
        on_progress(done, len(places))
    if broken:
        raise UserError(
            f"{source.path}: numbers that are not finite in {listed(broken)}; fetch the model anew"
        )
    if extra := _stored_head(source):
        audit.append(_check_tied(source, extra))
    return arrays, audit


def _places(facts: Facts) -> Iterator[tuple[Part, int | None]]:
    for part, each_layer in families.parts(facts):
        if each_layer:
            yield from ((part, layer) for layer in range(facts.num_hidden_layers))
        else:
            yield part, None


def check_names(source: Source) -> None:
    """Raise a UserError unless the source has exactly its family's tensors, at their shapes."""
    facts = source.facts
    wanted = {source.name_of(part, layer): part for part, layer in _places(facts)}
    present = set(source.names)
    faults = []
    if missing := sorted(wanted.keys() - present):
        faults.append(f"missing tensors: {listed(missing)}")
    ignored = {name for name in present if name.endswith(IGNORED)}
    unused = present - wanted.keys() - ignored - {_stored_head(source)}
    if unused:
        faults.append(f"tensors that a {facts.family} model has not: {listed(sorted(unused))}")
    shapes = []
    for name in sorted(wanted.keys() & present):
        expected, (_, shape) = families.shape(wanted[name], facts), source.describe(name)
        if shape != expected:
            shapes.append(f"{name} {list(shape)}, not {list(expected)}")
    if shapes:
        faults.append(f"tensors of another shape than the config says: {listed(shapes)}")
    if faults:
        raise UserError(
            f"{source.path}: {'; '.join(faults)}. Fetch the model anew, or take the config that "
            "belongs to these weights"
        )


def _stored_head(source: Source) -> str:
    """The name of an output matrix that a model with tied embeddings has stored too; or empty."""
    name = source.name_of(HEAD, None)
    return name if source.facts.tie_word_embeddings and name in source.names else ""


def _check_tied(source: Source, name: str) -> AuditRow:
    embedding = source.name_of(families.EMBEDDING, None)
    one, two = (np.ascontiguousarray(source.raw(n)) for n in (name, embedding))
    if one.dtype != two.dtype or one.tobytes() != two.tobytes():
        raise UserError(
            f"{source.path}: its config ties the output matrix to the embedding, and {name} "
            f"differs from {embedding}; set tie_word_embeddings to what the model was trained with"
        )
    dtype, shape = source.describe(name)
    return AuditRow(name, _digest(one), dtype, shape, families.EMBEDDING.target, "equal to it")


def _taken(source: Source, part: Part, layer: int | None, name: str) -> tuple[AuditRow, np.ndarray]:
    dtype, shape = source.describe(name)
    steps = []
    array = source.read(name)
    if source.kind == "gguf" and dtype not in ("F32", "F16", "BF16"):
        steps.append("dequantise")
    if array.dtype != np.float32:
        steps.append("cast")
        array = array.astype(np.float32)
    if part.turned and source.half_split:
        steps.append("permute")
        array = array[interleaved(array.shape[0], source.facts.head_dim)]
    if part.matrix:
        steps.append("transpose")
        array = array.T
    where = part.target if layer is None else f"{BLOCKS}{part.target}[{layer}]"
    row = AuditRow(name, _digest(source.raw(name)), dtype, shape, where, ", ".join(steps) or "copy")
    return row, np.ascontiguousarray(array)


def interleaved(rows: int, head_dim: int) -> np.ndarray:
    """Rows of half-split heads in the order of interleaved ones: 2i ← i, 2i + 1 ← i + K/2."""
    head = np.arange(head_dim).reshape(2, -1).T.ravel()
    return (np.arange(0, rows, head_dim)[:, None] + head).ravel()


def half_split(rows: int, head_dim: int) -> np.ndarray:
    """The inverse order of `interleaved`."""
    return np.argsort(interleaved(rows, head_dim))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def listed(names: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
