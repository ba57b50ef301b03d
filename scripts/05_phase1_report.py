r"""Report on experiments: one row per run, paths against B1, and the gate's verdict.

For example:
  uv run --exact python scripts/05_phase1_report.py --exp-dir ./experiments
  uv run --exact python scripts/05_phase1_report.py --exp-folder phase1_pilot
  uv run --exact python scripts/05_phase1_report.py --exp-folder phase1_pilot --format csv \
      --csv-out runs.csv --out report

Without --exp-folder it reports on every experiment folder below --exp-dir: JSON is then a list, and
--out a folder with a report for each. The chosen format goes to stdout, notes on what is missing or
broken to stderr. It reads run records and the plans' manifest.json, nothing else; runs that failed
or are not there yet are reported.
Exit codes: 0 all there is was read; 1 a record is broken, and the rest was reported (or a failure
under way); 2 a mistake in the arguments, nothing written
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.entry import exit_codes
from ttt.errors import UserError
from ttt.infra.record import write_whole
from ttt.report import phase1, tables


def main() -> None:
    """Read the command line; report."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    root = os.environ.get("TTT_EXPERIMENTS", "./experiments")
    add("--exp-dir", default=root, help="default: $TTT_EXPERIMENTS or ./experiments")
    add("--exp-folder", default="", help="the one to report on; default: every one with runs")
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
        reports = phase1.read_all(args.exp_dir, args.exp_folder, args.checkpoint_root)
        outs = {}  # folder of a report -> the report
        for report in reports if args.out else ():
            below = "" if args.exp_folder else report.runs["exp_folder"].iloc[0]
            outs[args.out / below] = report
        for folder in outs:
            tables.check_out(folder)
        if args.dry_run:
            for report in reports:
                print(f"would report on {len(report.runs)} runs of {report.folder} to stdout")
            for path in [*filter(None, [args.csv_out]), *outs]:
                print(f"would write {path}")
            return
        sys.stdout.write(tables.to_text(reports, args.format, one=bool(args.exp_folder)))
        if args.csv_out:
            write_whole(args.csv_out, tables.to_csv(reports))
        for folder, report in outs.items():
            sys.stderr.writelines(f"{path}\n" for path in tables.save(report, folder))
        sys.stderr.writelines(f"{note}\n" for report in reports for note in tables.notes(report))
        sys.exit(1 if any(report.faults for report in reports) else 0)


if __name__ == "__main__":
    main()
