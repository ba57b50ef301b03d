r"""Report on an experiment folder: one row per run, paths against B1, and the gate's verdict.

For example:
  uv run --exact python scripts/05_phase1_report.py --exp-folder phase1_pilot
  uv run --exact python scripts/05_phase1_report.py --exp-folder phase1_pilot --format csv \
      --csv-out runs.csv --out report

The chosen format goes to stdout, notes on what is missing or broken to stderr. It reads run records
and the plan's manifest.json, nothing else; runs that failed or are not there yet are reported.
Exit codes: 0 all there is was read; 1 a record is broken, and the rest was reported (or a failure
under way); 2 a mistake in the arguments, nothing written
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console

from ttt.entry import exit_codes
from ttt.errors import UserError
from ttt.evaluation.result import write_whole
from ttt.report import phase1, tables

WIDTH = 1000
"""Columns where the output is no terminal, so that no row of the tables is broken."""


def show(report: phase1.Report, form: str) -> None:
    """Print the report to stdout in one of the formats."""
    if form == "table":
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        console.print(tables.to_terminal(report, console.width))
    else:
        text = {"json": phase1.to_json, "csv": tables.to_csv, "markdown": tables.to_markdown}[form]
        sys.stdout.write(text(report))


def main() -> None:
    """Read the command line; report."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exp-dir", default="./experiments", help="holds experiment folders; default: %(default)s")
    add("--exp-folder", required=True, help="the one to report on")
    add("--format", default="table", choices=["table", "json", "csv", "markdown"])
    add("--csv-out", type=Path, metavar="FILE.csv", help="new file: one row per run, every column")
    add("--out", type=Path, metavar="FOLDER", help="page, CSV, JSON, pictures; new, or a report's")
    add("--checkpoint-root", help="where checkpoints lie now; default: as each run's settings say")
    add("--dry-run", action="store_true", help="say what would be read and written; no more")
    args = parser.parse_args()
    with exit_codes():
        if args.csv_out and (args.csv_out.exists() or not args.csv_out.parent.is_dir()):
            raise UserError(
                f"--csv-out {args.csv_out}: must be a new file in a folder that exists; "
                "move the old one away or name another"
            )
        if args.out:
            phase1.check_out(args.out)
        report = phase1.read(args.exp_dir, args.exp_folder, args.checkpoint_root)
        if args.dry_run:
            print(f"would report on {len(report.runs)} runs of {report.folder} to stdout")
            for path in filter(None, (args.csv_out, args.out)):
                print(f"would write {path}")
            return
        show(report, args.format)
        if args.csv_out:
            write_whole(args.csv_out, tables.to_csv(report))
        if args.out:
            sys.stderr.writelines(f"{path}\n" for path in phase1.save(report, args.out))
        sys.stderr.writelines(f"{note}\n" for note in tables.notes(report))
        sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    main()
