"""Flags that scripts 09, 11 and 12 share, as data: name -> options of argparse."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt.interop import catalog
from ttt.knobs import RUNTIME_MODES
from ttt.runs.external import BUDGETS

Flags = Mapping[str, Mapping[str, Any]]
_SWITCH = {"action": "store_true"}
_NUMBER = {"type": int}

MODEL: Flags = {
    "--model": {"default": "all", "help": f"all, {', '.join(catalog.MODELS)}; default: all"},
}
PROFILES: Flags = {
    "--profile-root": {
        "type": Path,
        "default": Path("artifacts/external_models"),
        "help": "of 07 and 10; default: %(default)s",
    },
    "--from-dir": {"type": Path, "help": "where the models lie, as for 07"},
}
PLACES: Flags = {
    "--checkpoint-root": {"help": "default: $TTT_CHECKPOINTS or ./checkpoints"},
    "--exp-dir": {"help": "root of run records; default: $TTT_EXPERIMENTS or ./experiments"},
    "--data-root": {"help": "folder with a token store per dataset, such as R/dclm_smollm2"},
    "--dclm-root": {"help": "token store of pretraining and adaptation, in the model's tokens"},
    "--books-root": {"help": "token store of the extensions, in the model's tokens"},
    "--override": {
        "action": "append",
        "default": [],
        "help": "KEY=VALUE for every run; repeatable",
    },
}
PLAN: Flags = {
    "--path": {"default": "all", "help": "all, scratch or adapter; default: all"},
    "--import-folder": {
        "default": catalog.EXP_FOLDER,
        "help": "where 10 puts imports; default: %(default)s",
    },
    "--pretrain-steps": _NUMBER,
    "--adapt-steps": _NUMBER,
    "--ext-steps": {"dest": "extension_steps", **_NUMBER},
    "--seq-length": _NUMBER | {"help": "of pretraining and adaptation; window and chunk follow"},
    "--ext-seq-length": {
        "dest": "extension_length",
        "help": "default: 4 x --seq-length",
        **_NUMBER,
    },
    "--global-batch-size": _NUMBER | {"help": "sequences per step of pretraining"},
    "--budget": {
        "choices": list(BUDGETS),
        "default": "pilot",
        "help": "what is not given: a trial for two cores, or the experiments' own; default: pilot",
    },
    "--bootstrap-token-data": _SWITCH | {"help": "the built-in text in place of both corpora"},
    "--dummy-dataset": _SWITCH | {"help": "random tokens in place of any store"},
    "--runtime-mode": {"default": "jax", "choices": RUNTIME_MODES, "help": "default: jax"},
    "--skip-existing": _SWITCH | {"help": "accept runs that another plan has made"},
}
EVALUATION: Flags = {
    "--contexts": {"help": "such as 8192,32768; default: the trained context and twice it"},
    "--datasets": {"help": "books3, dclm_filter_8k or others; default: that of the training"},
    "--suites": {"help": "some of loss_by_context,needles,long_decoding; default: all"},
    "--eval-split": {"help": "default: that of the training's evaluations"},
    "--eval-batches": _NUMBER | {"default": 8, "help": "of sequences of the longest context"},
    "--eval-batch-size": _NUMBER | {"help": "default: the run's own"},
    "--eval-seed": _NUMBER | {"help": "of stretches, prompts and samples; default: 0"},
    "--niah-tasks": {"help": "some of niah_single_1,niah_single_2,niah_single_3; default: all"},
    "--niah-lengths": {"help": "tokens of prompts; default: the contexts"},
    "--niah-positions": _NUMBER | {"help": "places of the needle; default: 5"},
    "--niah-examples": _NUMBER | {"help": "prompts for each task, length and place; default: 1"},
    "--niah-answer-tokens": _NUMBER | {"help": "default: 128"},
    "--decode-prefill": _NUMBER | {"help": "tokens read first; default: half the trained context"},
    "--decode-steps": _NUMBER | {"help": "tokens written; default: half the trained context"},
    "--decode-prompts": _NUMBER | {"help": "default: 4"},
    "--strict": _SWITCH | {"help": "a run that cannot be evaluated is a failure too"},
}


def add(parser: ArgumentParser, *groups: Flags, **defaults: Any) -> None:
    """Let the parser take the flags of these groups. defaults: by destination."""
    for group in groups:
        for flag, options in group.items():
            parser.add_argument(flag, **options)
    parser.set_defaults(**defaults)


def arguments(args: Namespace, *groups: Flags) -> list[str]:
    """The flags of these groups as a command line, with the values that `args` has."""
    words = []
    for group in groups:
        for flag, options in group.items():
            value = getattr(args, options.get("dest", flag[2:].replace("-", "_")))
            if value is True:
                words.append(flag)
            elif value is not None and value is not False:
                values = value if isinstance(value, list) else [value]
                words += [word for each in values for word in (flag, str(each))]
    return words
