r"""Print the commands of the ladder of warm starts, in order of dependency, for a shell.

For example:
  uv run --exact python scripts/03_pretrained_matrix.py --size 760m --dclm-path /data/dclm \
      --books-path /data/books --checkpoint-path /checkpoints
  uv run --exact python scripts/03_pretrained_matrix.py --paths P1-5pct,P1,P1-20pct,S1
  uv run --exact python scripts/03_pretrained_matrix.py --size tiny --matching tokens | bash -e

Lines that are no commands are comments. Budgets are the experiments' own; --matching tokens gives
every path the tokens of B1. With --deploy submitit a command only queues its job: wait for it
before the next. Where JAX's CUDA plugin is installed, the commands keep it (--extra). The W&B key
belongs in the variable WANDB_API_KEY and is never printed.
Exit codes: 0 printed; 1 a failure under way; 2 a mistake in the request
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from ttt.entry import exit_codes
from ttt.knobs import RUNTIME_MODES
from ttt.runs import registry, settings
from ttt.runs.plan import PlanRequest, commands


def main() -> None:
    """Read the command line and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--deploy", help="a choice of configs/deploy, such as interactive or submitit")
    add("--exp-folder", default="pretrained_phase1", help="default: pretrained_phase1")
    add("--size", default="760m", help="tiny, 125m or 760m; default: 760m")
    add(
        "--paths",
        default="B1,B2,P1,P2,P3",
        help="also S1, and P1-Npct, P3-Npct for N %% adaptation",
    )
    add("--seeds", help="such as 0,1,2; default: one run each, named as its experiment")
    add("--matching", default="own", choices=["own", "tokens"], help="default: own")
    add("--dclm-path", dest="dclm_root", help="token store that pretraining and adaptation read")
    add("--books-path", dest="books_root", help="token store that the extension reads")
    add("--checkpoint-path", dest="checkpoint_root", help="root of checkpoints")
    add("--exp-dir", help="root of run records")
    add("--runtime-mode", default="jax", choices=RUNTIME_MODES, help="default: jax")
    add("--dummy-dataset", action="store_true", help="random tokens in place of the stores")
    add("--override", action="append", default=[], help="KEY=VALUE for every run; repeatable")
    add("--wandb-entity")
    add("--wandb-project")
    add("--log-wandb", action="store_true", help="mirror every run to W&B")
    add("--dry-run", action="store_true", help="the same: nothing is ever done here but printing")
    args = parser.parse_args()
    with exit_codes():
        book = registry.load()
        size = book.size(args.size)
        paths = settings.names(args.paths, "--paths") or ()
        seeds = settings.seeds(args.seeds) or (None,)
        common = settings.of_flags(vars(args), size)
        request = PlanRequest(book, size, paths, seeds, registry.Budget(), common)
        print("\n".join(commands(request, args.matching)))


if __name__ == "__main__":
    main()
