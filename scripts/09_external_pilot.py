r"""Run the matrix of imported models in a short budget, then report.

For example:
  uv run --exact python scripts/09_external_pilot.py --model smollm2_135m --dry-run \
      --bootstrap-token-data
  uv run --exact python scripts/09_external_pilot.py --model smollm2_135m --bootstrap-token-data
  uv run --exact python scripts/09_external_pilot.py --model all --path adapter --data-root /data \
      --budget full --pretrain-steps 200

Imports come from --import-folder, where scripts/10 puts them. --bootstrap-token-data: the built-in
text in each model's own tokens in place of the corpora. The same command goes on where it stopped.
A model whose weights are not there is named, its runs are left out, and the exit code is 1.
Records, logs, manifest.json, report: EXP_DIR/EXP_FOLDER.
Exit codes: 0 all done; 1 a run failed, a gate does not hold, or a model is missing; 2 a mistake in
the request; 75 or 130 stopped when asked (the same command goes on)
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from rich.console import Console

from ttt.entry import exit_codes
from ttt.report import tables
from ttt.runs import execute, external, external_flags, pilot


def main() -> None:
    """Read the command line and run."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    folder = "external_phase1_pilot"
    parser.add_argument("--exp-folder", default=folder, help=f"default: {folder}")
    groups = (external_flags.MODEL, external_flags.PLAN, external_flags.PLACES)
    external_flags.add(parser, *groups)
    parser.add_argument("--dry-run", action="store_true", help="show runs and commands")
    args = parser.parse_args()
    with exit_codes():
        prepared = external.prepare(vars(args))
        if args.dry_run:
            pilot.show(prepared, Console())
            return
        with tables.reporting(prepared.folder, args.checkpoint_root, print):
            execute.run(prepared, Console())
        external.check_complete(prepared)


if __name__ == "__main__":
    main()
