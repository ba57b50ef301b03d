r"""Make a token store (zarr, splits `train` and `val`) from text, built-in text or random ids.

For example:
  uv run --exact python scripts/04_make_token_data.py --out data/builtin --source builtin
  uv run --exact python scripts/04_make_token_data.py --out data/mine --source text \
      --text 'notes/**/*.txt' --tokenizer tokenizer.json
  uv run --exact python scripts/04_make_token_data.py --out data/smoke
  uv run --exact python scripts/04_make_token_data.py --out data/random --source random \
      --vocab-size 128256 --train-tokens 1000000 --val-tokens 100000

A store appears whole or not at all; text is read from disk, and nothing of it is changed.
Exit codes: 0 done; 1 a failure under way; 2 a mistake in the request; 130 interrupted
"""

import argparse
from functools import partial

from ttt.dataloader import token_store
from ttt.dataloader.make_store import DEFAULTS, make_store
from ttt.entry import exit_codes
from ttt.infra.progress import Bar


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--out", required=True, help="folder of the new store; must not exist")
    add("--source", choices=list(DEFAULTS), default="random", help="default: %(default)s")
    add("--text", nargs="+", metavar="GLOB", help="files, one document each; ** is any folders")
    add("--tokenizer", metavar="bytes|FILE.json", help="default: bytes, 258 ids")
    add("--bos-token", help="starts each document; default: the usual names are tried")
    add("--val-share", type=float, help="share of the documents held out as val; default: 0.1")
    add("--train-tokens", type=int, help="default: all; random: 1000000")
    add("--val-tokens", type=int, help="default: all; random: 100000")
    add("--vocab-size", type=int, help="of random ids; default: 258")
    add("--seed", type=int, default=0, help="of the documents' order, or of random ids")
    add("--dry-run", action="store_true", help="check, show what would be made, write nothing")
    return parser.parse_args()


def main() -> None:
    """Read the command line; make the store and describe it."""
    options = vars(parse_arguments())
    out, dry_run = options.pop("out"), options["dry_run"]
    unit = "tokens" if options["source"] == "random" else "documents"
    with exit_codes():
        with Bar() as bar:
            made = make_store(out, **options, on_progress=partial(bar, f"making {out}", unit=unit))
        print(f"{'would make' if dry_run else 'made'} {out}: {made}")
        for split in () if dry_run else ("train", "val"):
            length = token_store.open_split(out, split).shape[0]
            print(f"{out}/{split}: {length} tokens, {token_store.fingerprint(out, split)}")


if __name__ == "__main__":
    main()
