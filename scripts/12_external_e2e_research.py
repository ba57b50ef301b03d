r"""Prepare, import, train and evaluate pretrained models: scripts 07, 10, 09 and 11 as one plan.

For example:
  uv run --exact python scripts/12_external_e2e_research.py --model smollm2_135m --budget pilot
  uv run --exact python scripts/12_external_e2e_research.py --model all --path all --budget pilot \
      --data-root /data
  uv run --exact python scripts/12_external_e2e_research.py --model qwen2_5_0_5b --budget full \
      --from-dir Qwen2.5-0.5B --dclm-root /data/dclm_qwen2_5 --books-root /data/books_qwen2_5

A pilot reads the built-in text unless other data is named. The same command goes on where it
stopped. A model that is not there is named with the remedy, the others are done, and the exit code
is 1. In the end one page has everything: EXP_DIR/EXP_FOLDER_external_eval.md.
Exit codes: 0 all done; 1 something could not be done; 2 a mistake in the request; 75 or 130 stopped
when asked (the same command goes on)
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.entry import exit_codes
from ttt.runs import external_flags as flags
from ttt.runs import external_research


def main() -> None:
    """Read the command line and go through the four scripts."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    folder = "external_phase1_research"
    parser.add_argument("--exp-folder", default=folder, help=f"default: {folder}")
    flags.add(parser, flags.MODEL, flags.PROFILES, flags.PLAN, flags.PLACES, flags.EVALUATION)
    for step in external_research.STEPS:
        parser.add_argument(f"--skip-{step}", action="store_true", help=f"leave out: {step}")
    parser.add_argument("--dry-run", action="store_true", help="show the commands; do nothing")
    args = parser.parse_args()
    with exit_codes():
        commands = external_research.commands(args, Path(__file__).parent)
        if args.dry_run:
            print("\n".join(map(external_research.shown, commands)))
            return
        sys.exit(external_research.run(commands, print))


if __name__ == "__main__":
    main()
