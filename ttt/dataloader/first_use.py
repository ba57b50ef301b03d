"""Datasets that are made where they are first needed; all others the user brings."""

from pathlib import Path

from ttt.dataloader import builtin, prose_and_code

DATASETS = (*builtin.DATASETS, prose_and_code.NAME)
"""Their names."""


def ensure(name: str, root: Path | str, *, tokenizer_file: Path | None = None) -> None:
    """Make the dataset `name` of `DATASETS` at `root` unless it exists.

    tokenizer_file: of the model that reads it, for datasets in an imported model's tokens; raises
    UserError where those lack it.
    """
    if name == prose_and_code.NAME:
        prose_and_code.ensure(root, tokenizer_file)
    else:
        builtin.ensure(name, root, tokenizer_file=tokenizer_file)
