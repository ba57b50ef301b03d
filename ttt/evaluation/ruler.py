"""RULER's single needles in a haystack: prompts, and whether an answer holds the needle. No JAX.

Templates, needles, noise, value types, answer length, scoring, length and placement are those that
RULER publishes (Hsieh et al. 2024, arXiv 2404.06654), tasks `niah_single_1` to `_3`; with one
needle RULER puts its templates into the singular, as they stand in `ruler.json`. `differences` says
what is not as there.
"""

import ast
import bisect
import json
import random
import re
import sys
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ttt.dataloader import builtin
from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import UserError

_TEXTS = json.loads(resources.files(__package__).joinpath("ruler.json").read_text("utf-8"))
TASKS: dict[str, dict[str, str]] = _TEXTS["tasks"]
"""Name -> `value_type` (`number` or `uuid`), `haystack` (`noise` or `essay`), `label`."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


class Haystack(NamedTuple):
    """Text to hide a needle in."""

    source: str
    """In words, for the record."""
    units: tuple[str, ...]
    """What a length is made up of: words, or one line that is repeated as often as it fits."""
    endless: bool = False
    """Whether it is that one line."""

    @property
    def joint(self) -> str:
        """What stands between two sentences, and two units."""
        return "\n" if self.endless else " "

    def sentences(self, count: int) -> list[str]:
        """The first `count` units, cut where a needle may stand."""
        if self.endless:
            return list(self.units) * count
        return _SENTENCE_END.split(" ".join(self.units[:count]))


class Prompt(NamedTuple):
    """A haystack with its needle and the question, as tokens."""

    tokens: Int[np.ndarray, " N"]
    """BOS, instruction, haystack, question, and the beginning of the answer."""
    answer: str
    depth: float
    """Share of the haystack's sentences before the needle, in percent."""
    needle_at: int
    """Tokens before the needle."""

    @property
    def distance(self) -> int:
        """Tokens from the needle's first to the prompt's last, after which the answer starts."""
        return len(self.tokens) - 1 - self.needle_at


# ---- haystacks ---------------------------------------------------------------------------


def noise() -> Haystack:
    """The haystack of `niah_single_1`; as long as it is asked to be."""
    return Haystack("RULER's five sentences, repeated", (_TEXTS["noise"],), endless=True)


def essays(file: str) -> Haystack:
    """The haystack of the other tasks: a file's text, or prose that every Python has at hand.

    A JSON file gives its `text`, as RULER's PaulGrahamEssays.json does. Raises a UserError.
    """
    if not file:
        prose, source = _docstrings(), "docstrings of the standard library's held-out modules"
        source += ", in place of RULER's essays by Paul Graham"
    else:
        prose, source = _read(Path(file).expanduser()), f"the file {Path(file).name}"
    return Haystack(source, tuple(prose.split()))


def _read(path: Path) -> str:
    remedy = "give a text file, or leave evaluation.needles.haystack empty for the built-in text"
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(content)["text"]
        fault = "" if isinstance(content, str) and content.strip() else "it holds no text"
    except OSError as error:
        fault = f"no such file, or it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError) as error:
        fault = f"no UTF-8 text, or JSON without a `text` ({type(error).__name__}: {error})"
    if fault:
        raise UserError(f"evaluation.needles.haystack={path}: {fault}; {remedy}")
    return content


def _docstrings() -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = []
    for path in builtin.corpus().splits["val"]:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some modules are there to be broken
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        docs += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return " ".join(docs)


def vocabulary_text() -> str:
    """Every word that prompts in noise can hold, numbers aside, to make a tokenizer from."""
    names = ("context", "question", "answer_prefix", "needle", "noise", "adjectives", "nouns")
    words = {"value_type": "number", "key": "-", "value": "", "context": ""}
    return " ".join(_TEXTS[name].format(**words) for name in names) + " numbers"


# ---- prompts -----------------------------------------------------------------------------


def depths(count: int) -> list[float]:
    """Evenly spread whole percents from 0 to 100; one alone is the middle. RULER has 40."""
    return [50.0] if count == 1 else np.round(np.linspace(0, 100, count)).tolist()


RULERS_DEPTHS = depths(40)


def differences(drawn: bool) -> list[str]:
    """In what prompts are not RULER's; `drawn`: whether depths are drawn as there."""
    depth = (
        "depths are evenly spread; RULER draws one for each prompt (evaluation.needles.depths=0)"
    )
    return [
        *([] if drawn else [depth]),
        "a length counts the BOS, which RULER leaves out: prompts are a token shorter",
        "keys are of our own list of adjectives and nouns",
        "sentences of essays end at . ! ? before a blank; RULER asks NLTK",
    ]


def make_prompts(
    task: str,
    haystack: Haystack,
    tokenizer: AbstractTokenizer,
    *,
    length: int,
    tokens_to_generate: int,
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> list[Prompt]:
    """Prompts that fill `length` tokens together with their answers, `samples` for each depth.

    As in RULER the haystack is as many words (lines of the noise) of the text's beginning as fit,
    and the needle stands between two sentences (lines). No depths: `samples` prompts in all, each
    at a depth that is drawn, one of 40 in essays and any line's in noise. What is hidden is a
    function of seed, task, length, depth and sample alone. Raises a UserError where not one
    unit fits, or the text is too short.
    """
    kind = TASKS[task]["value_type"]
    most = length - tokens_to_generate
    count = 0
    prompts = []
    for chosen, sample in product(depths or ["drawn"], range(samples)):
        rng = random.Random(f"{seed}/{task}/{length}/{chosen}/{sample}")
        key = "-".join(rng.choice(_TEXTS[words].split()) for words in ("adjectives", "nouns"))
        if kind == "uuid":
            value = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        else:
            value = str(rng.randint(10**6, 10**7 - 1))
        words = {"value_type": kind, "key": key, "value": value}
        if isinstance(chosen, float):
            depth = chosen
        else:
            depth = 100 * rng.random() if haystack.endless else rng.choice(RULERS_DEPTHS)
        build = partial(_prompt, haystack, tokenizer, words, depth)
        count = count or _units_that_fit(build, haystack, task, most, length)
        prompt = build(count)
        while len(prompt.tokens) > most and count > 1:  # another key may be longer
            count -= 1
            prompt = build(count)
        prompts.append(prompt)
    return prompts


def _prompt(
    haystack: Haystack,
    tokenizer: AbstractTokenizer,
    words: dict[str, str],
    depth: float,
    count: int,
) -> Prompt:
    """The one with the first `count` units of the haystack."""
    sentences = haystack.sentences(count)
    place = int(len(sentences) * depth / 100)
    head, tail = _TEXTS["context"].format(**words, context="\0").split("\0")
    before = head + "".join(sentence + haystack.joint for sentence in sentences[:place])
    after = haystack.joint.join([_TEXTS["needle"].format(**words), *sentences[place:]]) + tail
    question = (_TEXTS["question"] + _TEXTS["answer_prefix"]).format(**words)
    ids = tokenizer.encode(before + after + question)
    tokens = np.concatenate([np.array([tokenizer.bos_token_id], np.int32), ids])
    return Prompt(tokens, words["value"], depth, 1 + len(tokenizer.encode(before)))


def _units_that_fit(
    build: Callable[[int], Prompt], haystack: Haystack, task: str, most: int, length: int
) -> int:
    """The largest number of units with which a prompt has at most `most` tokens."""

    def size(count: int) -> int:
        return len(build(count).tokens)

    if size(1) > most:
        raise UserError(
            f"evaluation.needles.lengths={length}: the shortest prompt of {task} takes {size(1)} "
            f"tokens, and its answer {length - most}; give at least {size(1) + length - most}"
        )
    available = sys.maxsize if haystack.endless else len(haystack.units)
    high = 1
    while size(high) <= most:
        if high == available:
            raise UserError(
                f"evaluation.needles.lengths={length}: with all its text ({haystack.source}) a "
                f"prompt of {task} has {size(high)} tokens, fewer than the {most} there is room "
                "for; lower the length, or give more text (evaluation.needles.haystack=FILE)"
            )
        high = min(2 * high, available)
    return bisect.bisect_right(range(1, high), most, key=size)


# ---- scores ------------------------------------------------------------------------------


def holds(prediction: str, answer: str) -> bool:
    """RULER's string match with one answer: whether it occurs anywhere, in any case of letters."""
    return answer.lower() in _UNPRINTABLE.sub("\n", prediction.strip()).strip().lower()
