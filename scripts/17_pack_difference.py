r"""Write a trained model as its difference from the imported one that it began with.

For example:
  uv run --exact python scripts/17_pack_difference.py --run adaptation_study/e2e \
      --parent external_phase1/import-smol135-fa-base --out adapted.safetensors

The file holds the layers that changed, in bfloat16, with settings and the parent's hashes.
scripts/16 --difference puts it on the parent again, on any machine that has the import.
Exit codes: 0 written; 1 a failure under way; 2 a mistake in the request
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.config import checkpoint_root
from ttt.entry import exit_codes


def main() -> None:
    """Read the command line; write the file."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="FOLDER/NAME below the checkpoint root, or a path")
    add("--parent", required=True, help="the import that the run's ancestors began with")
    add("--out", required=True, type=Path, help="file to write; must not exist")
    add("--checkpoint-root", default=checkpoint_root())
    args = parser.parse_args()
    with exit_codes():
        from ttt.infra.checkpoint import find_folder  # JAX, once the command line makes sense
        from ttt.interop import difference

        child, parent = (find_folder(args.checkpoint_root, run) for run in (args.run, args.parent))
        size = difference.write(child, parent, args.out)
        print(f"{args.out}: {size / 1e6:.1f} MB, the difference of {child} from {parent}")


if __name__ == "__main__":
    main()
