"""The commands of a plan as text for a shell: what script 03 prints."""

from collections.abc import Iterator, Sequence

from ttt.runs import compose
from ttt.runs.plan import PlanRequest, build


def commands(request: PlanRequest, matchings: Sequence[str]) -> Iterator[str]:
    """Lines in order of dependency; what is not a command is a comment."""
    plan = build(request, matchings, compose.facts)
    yield f"# {request.size.name}: {len(plan.runs)} runs, each after the one that it starts from"
    for path in plan.paths:
        matched = "" if path.matching == "own" else f", matched by {path.matching}"
        seed = "" if path.seed is None else f", seed {path.seed}"
        yield f"# {path.path}{matched}{seed}: {request.registry.path(path.path).title}"
        yield f"#   {' -> '.join(path.runs)}"
    for number, run in enumerate(plan.runs, 1):
        yield ""
        paths = dict.fromkeys(path.path for path in plan.paths if run.name in path.runs)
        start = f", from {run.parent}" if run.parent else ""
        yield (
            f"# {number}. {', '.join(paths)}: {run.steps:,} steps, {run.tokens:,} tokens at "
            f"{run.seq_length:,}{start}"
        )
        yield run.command_here
