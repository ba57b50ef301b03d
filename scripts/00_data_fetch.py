r"""Fetch the published token stores from their buckets, and check them.

For example:
  uv run --exact python scripts/00_data_fetch.py --billing-project my-project --dry-run
  uv run --exact python scripts/00_data_fetch.py --billing-project my-project \
      --datasets books3 --splits val
  uv run --exact python scripts/00_data_fetch.py --check-only
  uv run --exact python scripts/00_data_fetch.py --source-root gs://my-mirror/stores \
      --endpoint-url http://localhost:9023

The reader pays for the published buckets: --billing-project names a Google Cloud project of yours,
and `gcloud auth application-default login` logs you in. A dataset goes to DEST_ROOT/NAME, where
training looks for it. The same command continues an interrupted fetch; each file is compared with
the store's checksum. --check-only uses no network, unless --billing-project, --source-root or
--endpoint-url is given: then each file is compared with the store's listing.

Exit codes: 0 all is complete and right; 1 a failure under way, or --check-only found damage;
2 a mistake in the request; 130 interrupted
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.dataloader.fetch import Request, check, fetch
from ttt.dataloader.token_store import PUBLISHED
from ttt.entry import exit_codes
from ttt.errors import UserError
from ttt.infra.progress import Bar


def main() -> None:
    """Read the command line; fetch, or check."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    data = os.environ.get("TTT_DATA", "./data")
    add("--dest-root", type=Path, default=data, help=f"default: $TTT_DATA or ./data, now {data}")
    add("--datasets", default=",".join(PUBLISHED), help="comma-separated; default: %(default)s")
    add("--splits", default="train,val", help="comma-separated; default: %(default)s")
    add("--billing-project", metavar="PROJECT", help="Google Cloud project that pays")
    add("--source-root", metavar="gs://BUCKET/PATH", help="holds the datasets by name: a mirror")
    add("--endpoint-url", metavar="URL", help="another store or an emulator, used without "
        "credentials; default: $STORAGE_EMULATOR_HOST, or Google's")  # fmt: skip
    add("--threads", type=int, default=16, help="transfers at a time; default: %(default)s")
    add("--check-only", action="store_true", help="check what is on the disk, fetch nothing")
    add("--force", action="store_true", help="fetch again the files that differ from the store's")
    add("--dry-run", action="store_true", help="list and compare, write nothing")
    args = vars(parser.parse_args())
    check_only, dry_run = args.pop("check_only"), args.pop("dry_run")
    for name in ("datasets", "splits"):
        args[name] = [part.strip() for part in args[name].split(",")]
    with exit_codes(), Bar() as bar:
        request = Request(**args)
        if check_only and (request.force or dry_run):
            raise UserError("--check-only changes nothing: leave out --force and --dry-run.")
        if check_only:
            check(request, on_message=bar.say, on_progress=bar)
        else:
            fetch(request, dry_run=dry_run, on_message=bar.say, on_progress=bar)


if __name__ == "__main__":
    main()
