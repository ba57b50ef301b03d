r"""Print the commands of the matrix of imported models, in order of dependency, for a shell.

For example:
  uv run --exact python scripts/08_external_matrix.py --model smollm2_360m --path adapter
  uv run --exact python scripts/08_external_matrix.py --model smollm2_135m \
      --dclm-root /data/dclm --books-root /data/books

From scratch: pretraining and extension, with full attention and as TTT-E2E. Adapter: the imported
weights go on with full attention, are cut to a sliding window, learn to learn (bridge), or are
extended as TTT-E2E at once (direct). The stores hold the model's own tokens: make them with
scripts/04 and the tokenizer.json of the imported checkpoint. Lines that are no commands are
comments. The W&B key belongs in the variable WANDB_API_KEY and is never printed.
Exit codes: 0 printed; 1 a failure under way; 2 a mistake in the request
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from ttt.entry import exit_codes
from ttt.interop import catalog
from ttt.knobs import RUNTIME_MODES
from ttt.runs import external


def main() -> None:
    """Read the command line and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="all", help=f"all, {', '.join(catalog.MODELS)}; default: all")
    add("--path", default="all", help="all, scratch or adapter; default: all")
    add("--exp-folder", default=catalog.EXP_FOLDER, help=f"default: {catalog.EXP_FOLDER}")
    add("--deploy", help="a choice of configs/deploy, such as interactive or submitit")
    add("--dclm-root", help="token store of pretraining and adaptation, in the model's tokens")
    add("--books-root", help="token store of the extensions, in the model's tokens")
    add("--exp-dir", help="root of run records")
    add("--checkpoint-path", dest="checkpoint_root", help="root of checkpoints")
    add("--profile-root", help="of scripts 07 and 10; default: artifacts/external_models")
    add("--total-steps", type=int, help="of every run; default: the experiments' own")
    add("--seq-length", type=int, help="of every run; default: 8192, and 32768 in extensions")
    add("--global-batch-size", type=int, help="of every run; default: the experiments' own")
    add("--runtime-mode", default="jax", choices=RUNTIME_MODES, help="default: jax")
    add("--dummy-dataset", action="store_true", help="random tokens in place of the stores")
    add("--override", action="append", default=[], help="KEY=VALUE for every run; repeatable")
    add("--wandb-entity")
    add("--wandb-project")
    add("--log-wandb", action="store_true", help="mirror every run to W&B")
    add("--dry-run", action="store_true", help="the same: nothing is ever done here but printing")
    args = parser.parse_args()
    with exit_codes():
        print("\n".join(external.commands(vars(args))))


if __name__ == "__main__":
    main()
