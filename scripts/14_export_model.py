r"""Write a checkpoint as a Hugging Face folder: config.json, model.safetensors, tokenizer.json.

For example:
  uv run --exact python scripts/14_export_model.py external_phase1/import-smol135-fa-base \
      --out SmolLM2-135M
  uv run --exact python scripts/14_export_model.py /checkpoints/trial/pretrain-125m-fa --out out

Imported models and their descendants, and our own with model.post_norm=false and full attention,
are Llama, Qwen2 or Qwen3 to other programs; other models (prime MLPs, windows, norms behind) are
refused with the reason. The folder is read back and its logits compared before it gets its name.
Exit codes: 0 done; 1 a failure under way; 2 a mistake in the request
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.config import checkpoint_root
from ttt.entry import exit_codes


def main() -> None:
    """Read the command line and export."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="FOLDER/NAME below the checkpoint root, or the path of a run or a step")
    add("--out", type=Path, required=True, help="folder to write; it must not exist")
    add("--step", type=int, default=-1, help="default: the latest")
    add("--dtype", default="auto", help="auto (bfloat16 if that is exact), float32, bfloat16")
    add("--checkpoint-root", default=checkpoint_root())
    add("--dry-run", action="store_true", help="say which checkpoint it would be; do nothing")
    args = parser.parse_args()
    with exit_codes():
        from ttt.infra.checkpoint import find_folder
        from ttt.interop import export

        folder = find_folder(args.checkpoint_root, args.run, args.step)
        if args.dry_run:
            print(f"{folder} would become {args.out.absolute()}")
            return
        done = export.export(folder, args.out, dtype=args.dtype)
        difference = done.check["largest_logit_difference"]
        print(f"{done.folder}: {done.dtype}; logits within {difference:.1e} when read back")


if __name__ == "__main__":
    main()
