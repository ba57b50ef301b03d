"""The commands of a plan as text for a shell: what script 03 prints."""

from collections.abc import Iterator, Sequence

from ttt.runs import compose
from ttt.runs.plan import Order, Plan, build


def commands(order: Order, matchings: Sequence[str]) -> Iterator[str]:
    """Lines in order of dependency; what is not a command is a comment."""
    plan = build(order, matchings, compose.facts)
    yield f"# {order.size.name}: {len(plan.runs)} runs, each after the one that it starts from"
    for path in plan.paths:
        says = order.registry.paths[path.path].says
        yield f"# {_called(path.path, path.matching, path.seed)}: {says}"
        yield f"#   {' -> '.join(path.runs)}"
    for number, run in enumerate(plan.runs, 1):
        yield ""
        start = f", from {run.parent}" if run.parent else ""
        yield (
            f"# {number}. {_of(plan, run.name)}: {run.steps:,} steps, {run.tokens:,} tokens at "
            f"{run.seq_length:,}{start}"
        )
        yield run.command


def _called(path: str, matching: str, seed: int | None) -> str:
    """A path with what tells it from its like."""
    how = "" if matching == "own" else f", matched by {matching}"
    return f"{path}{how}{'' if seed is None else f', seed {seed}'}"


def _of(plan: Plan, name: str) -> str:
    """The paths that a run belongs to."""
    return ", ".join(dict.fromkeys(path.path for path in plan.paths if name in path.runs))
