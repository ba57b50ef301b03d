"""The scripts of imported models one after the other (script 12)."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ttt.entry import ASKED_TO_STOP
from ttt.runs import external_flags as flags
from ttt.runs.children import call

STEPS = {
    "prepare-profiles": "07_prepare_external_models.py",
    "seed-imports": "10_seed_external_import_checkpoints.py",
    "train": "09_external_pilot.py",
    "eval": "11_external_eval.py",
}
"""What can be left out -> the script that does it."""
_SMALL: Mapping[str, object] = {
    "eval_batches": 1,
    "niah_tasks": "niah_single_1",
    "niah_positions": 1,
    "niah_answer_tokens": 16,
    "decode_steps": 32,
    "decode_prompts": 1,
}
"""Of the evaluations of a pilot, where no flag says otherwise."""


def commands(args: Namespace, scripts: Path) -> list[list[str]]:
    """What is to run, with its flags. args: of script 12. scripts: the folder they are in."""
    if args.budget == "pilot":
        for name, value in _SMALL.items():
            if getattr(args, name) in (None, flags.EVALUATION[_flag(name)].get("default")):
                setattr(args, name, value)
        named = (args.data_root, args.dclm_root, args.books_root, args.dummy_dataset)
        args.bootstrap_token_data |= not any(named)  # a pilot needs no corpus of the user's
    imports = ["--exp-folder", args.import_folder]
    imports += ["--checkpoint-root", args.checkpoint_root] if args.checkpoint_root else []
    model, places = flags.arguments(args, flags.MODEL), flags.arguments(args, flags.PLACES)
    source = ["--from-dir", str(args.from_dir)] if args.from_dir else []
    root, own = str(args.profile_root), ["--exp-folder", args.exp_folder]
    words = {
        "prepare-profiles": [*model, "--out-root", root, *source],
        "seed-imports": [*model, "--profile-root", root, *imports],
        "train": [*model, *own, *flags.arguments(args, flags.PLAN), *places],
        "eval": [*own, *flags.arguments(args, flags.EVALUATION), *places],
    }
    return [
        [str(scripts / script), *words[step]]
        for step, script in STEPS.items()
        if not getattr(args, f"skip_{step.replace('-', '_')}")
    ]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def shown(command: Sequence[str]) -> str:
    """For a shell, in the repository."""
    script = Path(command[0])
    return shlex.join(["uv", "run", "--exact", "python", f"scripts/{script.name}", *command[1:]])


def run(commands: Sequence[Sequence[str]], say: Callable[[str], None]) -> int:
    """Run them in order; the exit code is 1 if something in one of them could not be done.

    A mistake in the request and a request to stop end it at once.
    """
    worst = 0
    for number, command in enumerate(commands, 1):
        say(f"step {number} of {len(commands)}: {shown(command)}")
        code = call([sys.executable, *command])
        if code in (2, ASKED_TO_STOP, 130):
            return code
        worst = max(worst, 1 if code else 0)
    return worst
