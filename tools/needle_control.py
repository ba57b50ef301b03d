r"""A positive control of the needles: tiny networks that were trained to recall find them.

One layer of full attention and one of sliding-window attention are trained on passkey prompts like
RULER's and on text that says the passkey again and again, with one token for each number; then
`evaluate` hides needles. Full attention must find them anywhere in its context, the sliding window
those that it still sees, and beyond it no more than chance (one in all numbers). If a network of
yours finds none, and this one does, then the fault is not in the measurement.

  uv run python tools/needle_control.py

Exit codes: 0 as it must be, 1 not
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from rich.console import Console

from ttt.dataloader import token_store
from ttt.dataloader.text import FileTokenizer
from ttt.evaluation import ruler

TASK, CONTEXT, WINDOW = "niah_single_1", 256, 96
LENGTHS, DEPTHS, SAMPLES, ANSWER = (128, CONTEXT), 9, 3, 4
METHODS = ("fa", "swa")


def make_store(folder: Path, documents: int = 2400) -> None:
    """`tokenizer.json`, and in `store` documents of `CONTEXT` tokens, each with one number."""
    splitter = tokenizers.pre_tokenizers.Whitespace()
    text = ruler.vocabulary_text()
    words = dict.fromkeys(["<s>", "<unk>", *(w for w, _ in splitter.pre_tokenize_str(text))])

    def tokenizer(names: Sequence[str]) -> FileTokenizer:
        ids = {name: i for i, name in enumerate(names)}
        own = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
        own.pre_tokenizer = splitter
        own.save(str(folder / "tokenizer.json"))
        return FileTokenizer(folder / "tokenizer.json")

    # The needles that `evaluate` will hide; any number is one token, known or not.
    unknowing = tokenizer(list(words))
    hidden = [p for length in LENGTHS for p in prompts(unknowing, length, SAMPLES, seed=0)]
    own = tokenizer([*words, *dict.fromkeys(prompt.answer for prompt in hidden)])
    numbers = np.arange(len(words), own.vocab_size)

    rng = np.random.default_rng(0)
    known = {str(length): prompts(own, length, 2, seed=1) for length in range(128, CONTEXT + 1, 16)}
    asked = [prompt.tokens for made in known.values() for prompt in made]
    noise = np.tile(own.encode(ruler.noise().units[0]), CONTEXT)
    said, unknown = own.encode(f": {hidden[0].answer}."), 1
    tokens = []
    for _ in range(documents):
        begun = np.array([own.bos_token_id, *noise[: rng.integers(100)]])
        parts = [asked[rng.integers(len(asked))] if rng.random() < 0.5 else begun]
        while sum(map(len, parts)) < CONTEXT:
            start = rng.integers(25)
            parts += [said, noise[start : start + rng.integers(12)]]
        document = np.concatenate(parts)[:CONTEXT]
        document[np.isin(document, [unknown, *numbers])] = rng.choice(numbers)
        tokens.append(document)
    held_out = documents // 20
    token_store.write(
        folder / "store",
        {"train": np.concatenate(tokens[held_out:]), "val": np.concatenate(tokens[:held_out])},
        attributes={"vocab_size": own.vocab_size, "bos_token_id": own.bos_token_id},
    )


def prompts(own: FileTokenizer, length: int, samples: int, seed: int) -> list[ruler.Prompt]:
    """The suite's own, at `DEPTHS` depths."""
    return ruler.make_prompts(
        TASK, ruler.noise(), own, length=length, tokens_to_generate=ANSWER,
        depths=ruler.depths(DEPTHS), samples=samples, seed=seed,
    )  # fmt: skip


def overrides(folder: Path, method: str) -> list[str]:
    """The settings of both commands, for what `make_store` left in `folder`."""
    vocab = FileTokenizer(folder / "tokenizer.json").vocab_size
    return [
        f"+experiment=tiny/pretrain/pretrain-tiny-{method}",
        *(f"model.{key}={value}" for key, value in {
            "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.06,
        }.items()),
        *(f"size.{key}={value}" for key, value in {
            "intermediate_size": 64, "window": WINDOW, "chunk": 64, "rope_theta": 1e6,
            "pretrain_steps": 200, "pretrain_lr": 3e-2, "pretrain_batch_size": 8,
            "pretrain_seq_length": CONTEXT,
        }.items()),
        "training.optimizer_outer.weight_decay=0.01",
        "training.count_model_tokens=0",
        "training.eval_batches=1",
        "training.dataset_name=control",
        f"+deploy_paths.data.control={folder}/store",
        f"deploy_paths.checkpoint={folder}/checkpoints",
        f"deploy_paths.experiments={folder}/experiments",
        f"evaluation.runs=[{','.join(f'pretrain-tiny-{name}' for name in METHODS)}]",
        "evaluation.suites=[needles]",
        f"evaluation.tokenizer={folder}/tokenizer.json",
        f"evaluation.needles.tasks=[{TASK}]",
        f"evaluation.needles.lengths=[{','.join(map(str, LENGTHS))}]",
        f"evaluation.needles.depths={DEPTHS}",
        f"evaluation.needles.samples={SAMPLES}",
        f"evaluation.needles.tokens_to_generate={ANSWER}",
        "evaluation.batch_size=9",
    ]  # fmt: skip


def found(folder: Path) -> dict[str, float]:
    """Share of needles found: by full attention, and by the sliding window in and out of sight."""
    path = folder / "experiments/default/evaluation-default/eval/needles-answers.csv"
    with path.open() as file:
        answers = list(csv.DictReader(file))
    right: dict[str, list[int]] = {"fa": [], "swa, in sight": [], "swa, beyond": []}
    for answer in answers:
        distance, needle = (
            int(answer["distance"]),
            20,
        )  # tokens, at most: its number may be in sight
        if answer["run"].endswith("fa"):
            right["fa"].append(int(answer["right"]))
        elif distance < WINDOW:
            right["swa, in sight"].append(int(answer["right"]))
        elif distance >= WINDOW + needle:
            right["swa, beyond"].append(int(answer["right"]))
    return {name: float(np.mean(own)) for name, own in right.items()}


def main() -> int:
    """Make, train, evaluate, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="to keep; default: one that is deleted")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as own:
        folder = (folder or Path(own)).resolve()
        folder.mkdir(exist_ok=True)
        make_store(folder)
        commands = [("train", method) for method in METHODS] + [("evaluate", "fa")]
        for command, method in commands:
            words = [sys.executable, "-m", f"ttt.{command}", *overrides(folder, method)]
            subprocess.run(words, check=True)
        shares = found(folder)
    Console().print(shares)
    return int(min(shares["fa"], shares["swa, in sight"]) < 0.9 or shares["swa, beyond"] > 0.2)


if __name__ == "__main__":
    sys.exit(main())
