r"""Run the ladder of warm starts in a short budget: B1, B2, P1, P2, P3 and more, then report.

For example:
  uv run --exact python scripts/06_phase1_pilot.py --size tiny --dry-run
  uv run --exact python scripts/06_phase1_pilot.py --size tiny
  uv run --exact python scripts/06_phase1_pilot.py --size tiny --exp-folder trial --seeds 0 \
      --paths B1,P1 --matching tokens --pretrain-steps 20 --adapt-steps 4 --ext-steps 4
  uv run --exact python scripts/06_phase1_pilot.py --size 125m --data-root /data --exp-folder pilot

The same command goes on where it stopped. What is not given comes from the size's pilot in
configs/research/warmstart_registry.yaml. Records, logs, manifest.json and the
report, which is written at a failure too: EXP_DIR/EXP_FOLDER.
Exit codes: 0 all done; 1 a run failed or a gate does not hold; 2 a mistake in the request; 75 or
130 stopped when asked (the same command goes on)
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from rich.console import Console

from ttt.entry import exit_codes
from ttt.knobs import RUNTIME_MODES
from ttt.report import tables
from ttt.runs import execute, pilot


def main() -> None:
    """Read the command line and run."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exp-folder", default="phase1_pilot", help="default: phase1_pilot")
    add("--size", default="tiny", help="tiny, 125m or 760m; default: tiny")
    add("--paths", help="such as B1,B2,P1,P2,P3,S1,P1-5pct")
    add("--seeds", help="such as 0,1,2")
    add("--matching", help="tokens, wall_clock (needs tokens too), own; with commas between")
    add("--pretrain-steps", type=int, help="of B1; a matched path's follow from them")
    add("--adapt-steps", type=int, help="default: a tenth of the pretraining's")
    add("--ext-steps", dest="extension_steps", type=int)
    add("--seq-length", type=int, help="of pretraining and adaptation; window and chunk follow")
    add("--ext-seq-length", dest="extension_length", type=int, help="default: 4 x --seq-length")
    add("--global-batch-size", type=int, help="sequences per step of pretraining")
    add("--data-root", help="folder with a token store per dataset, such as R/dclm_filter_8k")
    add("--dclm-root", help="token store of pretraining and adaptation, in place of --data-root")
    add("--books-root", help="token store of the extension")
    add("--bootstrap-token-data", action="store_true", help="make the stores that are missing")
    add("--dummy-dataset", action="store_true", help="random tokens in place of any store")
    add("--runtime-mode", default="jax", choices=RUNTIME_MODES, help="default: jax")
    add("--checkpoint-root", help="default: $TTT_CHECKPOINTS or ./checkpoints")
    add("--exp-dir", help="root of run records; default: $TTT_EXPERIMENTS or ./experiments")
    add("--override", action="append", default=[], help="KEY=VALUE for every run; repeatable")
    add("--skip-existing", action="store_true", help="accept runs that another plan has made")
    add("--dry-run", action="store_true", help="show runs, tokens and commands; do nothing")
    args = parser.parse_args()
    with exit_codes():
        prepared = pilot.prepare(vars(args))
        if args.dry_run:
            pilot.show(prepared, Console())
            return
        with tables.reporting(prepared.folder, args.checkpoint_root, print):
            execute.run(prepared, Console())


if __name__ == "__main__":
    main()
