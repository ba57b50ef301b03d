"""What the configs say of a planned run, and overrides as Hydra reads them."""

import re
from copy import deepcopy
from functools import cache

from omegaconf import DictConfig, OmegaConf

from ttt.config import compose, resolve
from ttt.knobs import Config
from ttt.runs.plan import Facts, PlannedRun

_PLAIN = re.compile(r"[\w./:-]+", re.ASCII)
_OTHERWISE_TYPED = re.compile(r"[-+.\d_e]*|true|false|null|yes|no|on|off|inf|nan", re.IGNORECASE)


def override(key: str, text: str) -> str:
    """`KEY=VALUE` with the text as it is, whatever is in it: blanks, commas, quotes, dollars."""
    if _PLAIN.fullmatch(text) and not _OTHERWISE_TYPED.fullmatch(text):
        return f"{key}={text}"
    # Hydra takes a backslash before a quote for an escape, OmegaConf one before `${`.
    inner = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    inner = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", inner)
    return f"{key}='{inner}'"


# What tells runs of one stage apart: nothing in the configs follows from it.
_OWN = re.compile(r"(training\.(?:exp_name|resume_exp_name|model_seed|data_seed))=(.*)")


@cache
def _composed(arguments: tuple[str, ...]) -> DictConfig:
    return compose(arguments)


@cache
def facts(experiment: str, overrides: tuple[str, ...]) -> Facts:
    """Steps and shapes of a run; raises UserError where its configuration is faulty."""
    training = resolve(_composed((f"+experiment={experiment}", *overrides))).training
    return Facts(training.total_steps, training.seq_length, training.global_batch_size)


@cache
def config_of(run: PlannedRun) -> Config:
    """All settings of a planned run."""
    own = [match.groups() for text in run.arguments if (match := _OWN.fullmatch(text))]
    cfg = deepcopy(_composed(tuple(t for t in run.arguments if not _OWN.fullmatch(t))))
    for key, text in own:
        OmegaConf.update(cfg, key, int(text) if key.endswith("seed") else text)
    return resolve(cfg)
