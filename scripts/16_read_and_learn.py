r"""Read a long text with a model that learns while it reads, and with the same model not learning.

For example:
  uv run --exact python scripts/16_read_and_learn.py --run adaptation_study/e2e --text BOOK.txt
  uv run --exact python scripts/16_read_and_learn.py --run default/pretrain-tiny-e2e \
      --text README.md --tokens 8192
  uv run --exact python scripts/16_read_and_learn.py --difference adapted.safetensors \
      --text BOOK.txt

A line of progress shows the loss of the last tokens, both ways. In the end: a picture of both along
the text, every token's loss as CSV, and what learning gained and cost.
Exit codes: 0 done; 1 a failure under way; 2 a mistake in the request; 130 interrupted
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ttt.config import checkpoint_root
from ttt.entry import exit_codes


def main() -> None:
    """Read the command line; read the text."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--run", help="FOLDER/NAME below the checkpoint root, or a checkpoint's path"
    )
    which.add_argument("--difference", type=Path, help="file of scripts/17; its parent is imported")
    add("--text", required=True, type=Path, help="a text file, UTF-8")
    add("--tokens", type=int, default=0, help="read so many; default: the whole text")
    add("--checkpoint-root", default=checkpoint_root())
    add("--out", type=Path, default=Path("read_and_learn"), help="default: ./read_and_learn.*")
    args = parser.parse_args()
    with exit_codes():
        from ttt.evaluation import side_by_side  # JAX, once the command line makes sense
        from ttt.infra.checkpoint import find_folder
        from ttt.interop import difference

        if args.difference:
            folder = difference.restore(args.difference, args.checkpoint_root)
        else:
            folder = find_folder(args.checkpoint_root, args.run)
        ids = side_by_side.encode(folder, args.text, args.tokens)

        def show(done: int, total: int, learning: float, still: float) -> None:
            print(
                f"read {done:,} of {total:,}  loss {learning:.3f} learning, {still:.3f} not "
                f"({still - learning:+.3f} gained)",
                flush=True,
            )

        found = side_by_side.read(folder, ids, show)
        title = f"{folder.parent.name} reads {args.text.name}"
        side_by_side.save(found, args.out.with_suffix(".csv"))
        picture = side_by_side.draw(found, args.out.with_suffix(".png"), title)
        speeds = " and ".join(f"{len(ids) / seconds:,.0f}" for seconds in found.seconds)
        print(
            f"learning gained {found.gain:+.4f} nats per token, {found.gain_beyond():+.4f} beyond "
            f"the window of {found.window:,}; {speeds} tokens/s, learning and not"
        )
        print(f"picture: {picture}")


if __name__ == "__main__":
    main()
