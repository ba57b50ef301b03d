"""`benchmark`: time training, prefill, decoding and evaluation of several variants, side by side.

A variant is a set of overrides on top of the command line's. One whose numbers differ from those of
its plain twin gets no timings, and the command exits with 1.
"""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from itertools import chain, product
from pathlib import Path

import jax
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from ttt.bench import numerics, report, timing
from ttt.bench.timing import Timing
from ttt.config import compose, resolve, to_dict
from ttt.entry import hydra_entry
from ttt.errors import UserError
from ttt.infra import distributed
from ttt.infra.mesh import check_divides, device_mesh
from ttt.infra.record import RunRecord
from ttt.knobs import Config
from ttt.plan import hardware
from ttt.plan.memory_plan import MemoryPlan, choose

logger = logging.getLogger(__name__)


def run(config: Config) -> int | None:
    """Measure what the command line asks for; 1 if a variant failed."""
    return benchmark(config, HydraConfig.get().overrides.task)


def benchmark(config: Config, overrides: Sequence[str]) -> int | None:
    """Measure `config.benchmark`, whose variants build on `overrides`; 1 if a variant failed.

    Leaves `benchmark.json`, `benchmark.md` and, with several contexts, `benchmark.png` in the run
    record; the last line on stdout is a JSON object of the figures (`report.summary`).
    """
    settings, training = config.benchmark, config.training
    contexts = settings.contexts or (training.seq_length,)
    grid = [variants(config, overrides, context) for context in contexts]
    distributed.start(config.backend)
    if set(settings.calls) & timing.BATCH_CALLS:
        for variant in chain.from_iterable(configs.values() for configs in grid):
            batch = variant.training.global_batch_size // variant.training.accum_steps
            check_divides(device_mesh(variant.backend.state_parallel), batch)
    plans = [fit_memory(configs) for configs in grid]
    folder = Path(config.deploy_paths.experiments) / training.exp_folder / settings.exp_name
    record = RunRecord(folder)
    devices = [d.device_kind for d in jax.devices()]
    record.start(to_dict(config), devices=devices, data={"benchmark": "random tokens"})
    timings: list[Timing] = []
    status = "failed"
    try:
        for call, fitted in product(settings.calls, plans):
            timings += measure(config, {name: plan.config for name, plan in fitted.items()}, call)
            save(record, config, plans, timings)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        record.finish(status)
    show(record, config, timings)
    return 1 if any(t.failed for t in timings) else None


# ---- what to measure ---------------------------------------------------------------------


def variants(config: Config, overrides: Sequence[str], context: int) -> dict[str, Config]:
    """Name -> configuration of every variant at a context; raises UserError with the name."""
    settings = config.benchmark
    size = [f"training.seq_length={context}"]
    if settings.tokens:
        size.append(f"training.global_batch_size={max(1, settings.tokens // context)}")
    configs = {}
    for name, own in (settings.variants or {config.training.exp_name: ""}).items():
        try:
            configs[name] = resolve(compose([*overrides, *size, *shlex.split(own)]))
        except UserError as error:
            raise UserError(f"benchmark.variants.{name}={own!r} at {context}: {error}") from error
    return configs


def fit_memory(configs: Mapping[str, Config]) -> dict[str, MemoryPlan]:
    """The variants with every `auto` chosen for this machine's memory, each as if it were alone.

    Nothing is refused: training is what is predicted, a variant may only be read, and one that
    finds no room becomes a failed timing.
    """
    plans = {}
    for name, config in configs.items():
        plans[name] = plan = choose(config, hardware.find_hardware(config))
        level = logging.INFO if plan.fits else logging.WARNING
        logger.log(level, "%s at %d: %s", name, config.training.seq_length, plan.describe())
    return plans


# ---- measuring ---------------------------------------------------------------------------


def measure(config: Config, configs: Mapping[str, Config], call: str) -> list[Timing]:
    """One call of all variants at one context; those with wrong numbers are refused."""
    settings = config.benchmark
    refused: dict[str, Timing] = {}
    for name, variant in configs.items():
        if reason := numerics.fault(variant):
            logger.info("%s: %s", name, reason)
            refused[name] = timing.failed(name, call, variant, reason)
    timed = timing.measure(
        {name: variant for name, variant in configs.items() if name not in refused},
        call,
        warmup=settings.warmup,
        repetitions=settings.repetitions,
        on_progress=logger.info,
    )
    return [*refused.values(), *timed]


def save(
    record: RunRecord,
    config: Config,
    plans: Sequence[Mapping[str, MemoryPlan]],
    timings: Sequence[Timing],
) -> None:
    """Write what is known so far."""
    known = {
        "variants": dict(config.benchmark.variants),
        "chosen": [
            {"variant": name, "context": plan.config.training.seq_length, **plan.chosen}
            for name, plan in chain.from_iterable(fitted.items() for fitted in plans)
            if plan.chosen
        ],
        "results": [t.to_dict() for t in timings],
    }
    text = json.dumps(known, indent=2, allow_nan=False) + "\n"
    (record.folder / "benchmark.json").write_text(text, encoding="utf-8")


def show(record: RunRecord, config: Config, timings: Sequence[Timing]) -> None:
    """Table and picture into the record, the table and one line of JSON to stdout."""
    text = report.table(timings)
    (record.folder / "benchmark.md").write_text(text, encoding="utf-8")
    if len({t.context for t in timings if not t.failed}) > 1:
        picture = record.folder / "benchmark.png"
        device = jax.devices()[0].device_kind
        report.draw(timings, picture, title=f"{config.model.name}, {jax.device_count()} x {device}")
        logger.info("picture: %s", picture)
    logger.info("numbers: %s", record.folder / "benchmark.json")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(text)
    console.print(report.summary(timings))


main = hydra_entry(run)

if __name__ == "__main__":
    main()
