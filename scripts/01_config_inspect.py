r"""Show what a configuration amounts to: data, paths, parameters, FLOPs and memory per device.

For example:
  uv run --exact python scripts/01_config_inspect.py --devices 8 --memory-gb 141 --out costs.json \
      --override +experiment=3b/pretrain/pretrain-3b-e2e --override training.accum_steps=2
FLOPs count matrix products; "as run" has what is computed twice. "plan": what `auto` means there.
Exit codes: 0 shown; 1 a failure under way; 2 a mistake in the request
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf, errors
from rich.console import Console
from rich.table import Table

from ttt.config import compose, resolve
from ttt.entry import exit_codes
from ttt.errors import UserError
from ttt.knobs import Config
from ttt.report.inspection import inspect, readable


def composed(overrides: list[str]) -> Config:
    """The configuration; a path that is not set is empty."""
    cfg = compose(overrides)
    data = {*cfg.deploy_paths.data, OmegaConf.select(cfg, "training.dataset_name")} - {None}
    for name in ("checkpoint", "experiments", *(f"data.{key}" for key in data)):
        path = ""
        with suppress(errors.OmegaConfBaseException):  # made from a variable that is not set
            path = OmegaConf.select(cfg, f"deploy_paths.{name}") or ""
        OmegaConf.update(cfg, f"deploy_paths.{name}", path, force_add=True)
    return resolve(cfg)


def with_full_attention(overrides: list[str]) -> Config | None:
    """The same size and context with full attention; None where the overrides do not fit it."""
    others = [text for text in overrides if text.lstrip("+").split("=")[0] != "method"]
    try:
        return composed([*others, "method=fa"])
    except UserError:
        return None


def places(config: Config) -> dict[str, str]:
    """Where data, checkpoints and records lie, and whether they are there."""
    paths, name = config.deploy_paths, config.training.dataset_name
    data = {} if config.training.dummy_dataset else {f"dataset {name}": paths.data[name]}
    listed = data | {"checkpoint": paths.checkpoint, "experiments": paths.experiments}
    missing = {key: "" if Path(path).exists() else "missing: " for key, path in listed.items()}
    return {key: missing[key] + path if path else "unset" for key, path in listed.items()}


def main() -> None:
    """Read the command line; show, and write what is asked for."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--override", action="append", default=[], help="as for train; repeatable")
    add("--devices", type=int, default=1, help="that share a batch; default: 1")
    add("--memory-gb", type=float, default=0.0, help="to use on each; default: no limit")
    add("--out", type=Path, metavar="FILE.json", help="new file, with all numbers")
    args = parser.parse_args()
    with exit_codes():
        if args.out and (args.out.exists() or not args.out.parent.is_dir()):
            raise UserError(f"--out {args.out}: must be a new file in a folder that exists")
        config, full = composed(args.override), with_full_attention(args.override)
        sections = {"paths": places(config)} | inspect(config, args.devices, args.memory_gb, full)
        for title, rows in sections.items():
            table = Table(title, "")
            for name, value in rows.items():
                table.add_row(name, readable(title, value))
            Console().print(table)
        if args.out:
            args.out.write_text(json.dumps(sections, indent=2) + "\n")


if __name__ == "__main__":
    main()
