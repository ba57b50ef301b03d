r"""Import the weights of pretrained models into checkpoints, with an audit and a logits check.

For example:
  uv run --exact python scripts/10_seed_external_import_checkpoints.py --model smollm2_135m
  uv run --exact python scripts/10_seed_external_import_checkpoints.py --model qwen2_5_0_5b \
      --from-dir Qwen2.5-0.5B
  uv run generate +run=external_phase1/import-smol135-fa-base generate.prompt="The sea"

Models come from the profiles of scripts/07, or from --from-dir. Every tensor is accounted for, and
the logits of 64 tokens are compared with a forward pass of the source's own tensors, before
anything is written: CHECKPOINT_ROOT/EXP_FOLDER/import-SHORT-fa-base/{0/, latest.json}. There are no
placeholder weights: a model that is missing is named, with the remedy. An import that is there is
not imported again without --force.
Exit codes: 0 all done; 1 something could not be done; 2 a mistake in the request
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.config import checkpoint_root
from ttt.entry import exit_codes
from ttt.infra.progress import Progress
from ttt.interop import catalog


def main() -> None:
    """Read the command line and import."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    keys = ", ".join(catalog.MODELS)
    add("--model", default="all", help=f"all, {keys}, or any name with --from-dir; default: all")
    add("--profile-root", type=Path, default=Path("artifacts/external_models"), help="of 07")
    add("--checkpoint-root", default=checkpoint_root())
    add("--exp-folder", default=catalog.EXP_FOLDER, help=f"default: {catalog.EXP_FOLDER}")
    add("--from-dir", type=Path, help="Hugging Face folder or GGUF file, in place of a profile")
    add("--force", action="store_true", help="import again what is imported")
    add("--dry-run", action="store_true", help="check sources and hashes; write nothing")
    args = parser.parse_args()
    with exit_codes():
        models = catalog.requested(args.model, args.from_dir)

        def seed(key: str) -> None:
            from ttt.interop import imports  # JAX, once the request is known to make sense

            model, folder = models[key]
            source, about = catalog.locate(model, args.profile_root, folder)
            if args.dry_run:
                print(f"{key}: {source.path} would become {imports.run_name(model.short)}")
                return
            place = {"root": args.checkpoint_root, "exp_folder": args.exp_folder}
            before = imports.imported_before(source, model.short, **place)
            if before and not args.force:
                print(f"{key}: imported already, from the same files: {before}")
                return
            with Progress(len(source.names), f"import {key}") as progress:
                done = imports.import_model(
                    source,
                    model.short,
                    **place,
                    about=about,
                    force=args.force,
                    on_progress=lambda count, total: progress.update(count),
                )
            check = done.check
            print(
                f"{key}: {len(done.audit)} tensors in {done.folder}; logits within "
                f"{check['largest_logit_difference']:.1e} of the source's own on "
                f"{check['tokens']} tokens, loss {check['loss']:.4f}"
            )

        sys.exit(catalog.each(tuple(models), seed, print))


if __name__ == "__main__":
    main()
