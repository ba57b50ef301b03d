r"""Evaluate the runs of an experiment folder: loss by context, needles, long decoding, cost.

For example:
  uv run --exact python scripts/11_external_eval.py --exp-folder external_phase1_pilot
  uv run --exact python scripts/11_external_eval.py --exp-folder external_phase1 \
      --datasets books3 --books-root /data/books_smollm2 --contexts 8192,32768,65536,131072

Each run is evaluated by a process of its own (`evaluate +run=…`), at its trained context and twice
that unless --contexts says otherwise, on the text that it was trained on unless --datasets names
others. What is done is not done again. All rows: EXP_DIR/EXP_FOLDER_external_eval.{json,csv}.
Exit codes: 0 every row has a value; 1 a row failed; 2 a mistake in the request; 75 or 130 stopped
when asked (the same command goes on)
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.entry import exit_codes
from ttt.report import external as report
from ttt.runs import external_eval, external_flags


def main() -> None:
    """Read the command line and evaluate."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    folder = "external_phase1_pilot"
    parser.add_argument("--exp-folder", default=folder, help=f"default: {folder}")
    parser.add_argument("--runs", help="names with commas between; default: all there are")
    external_flags.add(parser, external_flags.EVALUATION, external_flags.PLACES)
    parser.add_argument("--out-json", type=Path)
    parser.add_argument("--out-csv", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="show the commands; do nothing")
    args = parser.parse_args()
    with exit_codes():
        planned = external_eval.prepare(vars(args))
        if args.dry_run:
            print("\n".join(one.command for one in planned.evaluations))
            return
        rows = external_eval.run(planned, print, strict=args.strict)
        written = report.write(
            rows, planned.folder, args.checkpoint_root, args.out_json, args.out_csv
        )
        print(f"report: {written}")
        external_eval.check(rows)


if __name__ == "__main__":
    main()
