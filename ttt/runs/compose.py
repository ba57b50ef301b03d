"""What the configs say of a planned run, and overrides as Hydra reads them."""

import re
from functools import cache

from ttt.config import Config, compose, resolve
from ttt.runs.plan import Facts, Run

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


@cache
def facts(experiment: str, overrides: tuple[str, ...]) -> Facts:
    """Steps and shapes of a run; raises UserError where its configuration is faulty."""
    training = resolve(compose([f"+experiment={experiment}", *overrides])).training
    return Facts(training.total_steps, training.seq_length, training.global_batch_size)


@cache
def config_of(run: Run) -> Config:
    """All settings of a planned run."""
    return resolve(compose(run.arguments))
