r"""Check that a token store is fit to train on: ids, lengths, documents, degenerate regions.

For example:
  uv run --exact python scripts/02_data_validate.py --dataset-path data/builtin --seq-length 512
  uv run --exact python scripts/02_data_validate.py --dataset-path data/books3 --seq-length 32768 \
      --vocab-size 128256 --bos-token-id 128000
  uv run --exact python scripts/02_data_validate.py --dataset-path data/mine --samples 0 \
      --format json

--samples of each split, evenly drawn, are looked at; 0: all. The vocabulary and the BOS are the
store's own where no option gives them; the published stores do not state them. Nothing is changed.

Exit codes: 0 all in order, warnings aside; 1 the data has a fault, or a failure under way;
2 a mistake in the request, or an unknown vocabulary
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ttt.dataloader.validate import Report, preview, validate
from ttt.entry import exit_codes
from ttt.errors import RunError, UserError
from ttt.infra.progress import Bar


def show(report: Report) -> None:
    """Print the findings as a table."""
    table = Table("split", "check", "verdict", "message")
    for row in report.findings:
        table.add_row(row.split, row.check, row.verdict, row.message)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    """Read the command line; check and show."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset-path", type=Path, required=True, help="the store's folder")
    add("--seq-length", type=int, default=8192, help="tokens of a sample; default: %(default)s")
    add("--splits", default="train,val", help="comma-separated; default: %(default)s")
    add("--samples", type=int, default=1000, help="per split, 0: all; default: %(default)s")
    add("--vocab-size", type=int, help="the model's; default: the store's")
    add("--bos-token-id", type=int, help="the model's; default: the store's")
    add("--seed", type=int, default=0, help="which samples are looked at; default: %(default)s")
    add("--dry-run", action="store_true", help="open the splits, show what would be looked at")
    add("--format", choices=["table", "json"], default="table", help="default: %(default)s")
    args = vars(parser.parse_args())
    path, form, dry_run = (args.pop(name) for name in ("dataset_path", "format", "dry_run"))
    args["splits"] = [part.strip() for part in args["splits"].split(",")]
    with exit_codes():
        if dry_run:
            for line in preview(path, args["splits"], args["seq_length"], args["samples"]):
                print(line)
            return
        with Bar() as bar:
            report = validate(path, **args, on_progress=bar)
        if form == "json":
            print(json.dumps(asdict(report), indent=2))
        else:
            show(report)
        if faults := report.having("fault"):
            raise RunError(
                f"{path} is not in order: {len(faults)} of the findings above are faults."
            )
        if any(finding.check == "ids" for finding in report.having("not checked")):
            raise UserError(f"{path}: its ids were not checked: give --vocab-size.")


if __name__ == "__main__":
    main()
