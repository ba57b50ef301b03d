"""RULER's single needles in a haystack: prompts, and whether an answer holds the needle. No JAX.

Templates, needles, noise, value types, answer length and scoring are those that RULER publishes
(Hsieh et al. 2024, arXiv 2404.06654), tasks `niah_single_1` to `_3`; with one needle RULER puts its
templates into the singular, as they stand here. Ours differ from its samples in three ways, none of
which touches the score: the depth is chosen instead of drawn, keys come from our own list of words,
and sentences end at punctuation instead of where NLTK sees an end.
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ttt.dataloader import text
from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import UserError

CONTEXT = (
    "A special magic {value_type} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value_type} afterwards.\n{context}\n"
)
QUESTION = "What is the special magic {value_type} for {key} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {value_type} for {key} mentioned in the provided text is"
NEEDLE = "One of the special magic {value_type}s for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TOKENS_TO_GENERATE = 128

_ADJECTIVES = (
    "amber brave calm clever crisp curious deep distant eager early fair famous gentle giant glad "
    "golden grand happy hidden humble jolly keen kind late light lively loud lucky mellow modern "
    "narrow noble odd old pale patient plain polite proud quick quiet rapid rare ripe round rustic "
    "sharp shy silent silver simple sleepy small smooth soft solid steady sunny swift tall tidy "
    "tiny vast vivid warm wide wild wise young"
)
_NOUNS = (
    "acorn anchor apple arrow badge barn basket beach bell bench bird boat bottle bridge brook "
    "candle canyon castle chair cloud coin comet copper coral daisy desk door drum eagle engine "
    "falcon feather fern field flute forest fox garden gate glove harbor hill horse island jacket "
    "kettle kite ladder lake lamp lantern leaf lemon map maple meadow mirror moon mountain needle "
    "oak ocean orchard owl paper pebble pencil piano pine planet pond poplar prairie puzzle rabbit "
    "raven ribbon river rocket sail shell shoe spoon star stone table tiger tower train tree "
    "valley violin wagon whale window wolf"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


class Task(NamedTuple):
    """One of RULER's tasks."""

    value_type: str
    """In the singular: `number` or `uuid`."""
    haystack: str
    """`noise` or `essay`."""


TASKS = {
    "niah_single_1": Task("number", "noise"),
    "niah_single_2": Task("number", "essay"),
    "niah_single_3": Task("uuid", "essay"),
}


class Haystack(NamedTuple):
    """Sentences to hide a needle between."""

    source: str
    """In words, for the record."""
    sentences: tuple[str, ...]
    joint: str
    """What stands between two of them."""
    endless: bool = False
    """Whether its one sentence is repeated as often as it fits."""


class Prompt(NamedTuple):
    """A haystack with its needle and the question, as tokens."""

    tokens: Int[np.ndarray, " N"]
    """BOS, instruction, haystack, question, and the beginning of the answer."""
    answer: str
    depth: float
    """Share of the haystack before the needle, in percent."""
    needle_at: int
    """Tokens before the needle."""

    @property
    def distance(self) -> int:
        """Tokens from the needle's first to the prompt's last, after which the answer starts."""
        return len(self.tokens) - 1 - self.needle_at


# ---- haystacks ---------------------------------------------------------------------------


def noise() -> Haystack:
    """The haystack of `niah_single_1`; as long as it is asked to be."""
    return Haystack("RULER's five sentences, repeated", (NOISE,), "\n", endless=True)


def essays(file: str) -> Haystack:
    """The haystack of the other tasks: a file's text, or prose that every Python has at hand.

    A JSON file gives its `text`, as RULER's PaulGrahamEssays.json does. Raises a UserError.
    """
    if not file:
        text_, source = _docstrings(), "docstrings of the standard library's held-out modules"
        source += ", in place of RULER's essays by Paul Graham"
    else:
        text_, source = _read(Path(file).expanduser()), f"the file {Path(file).name}"
    sentences = tuple(_SENTENCE_END.split(re.sub(r"\s+", " ", text_).strip()))
    return Haystack(source, sentences, " ")


def _read(path: Path) -> str:
    remedy = "give a text file, or leave evaluation.needles.haystack empty for the built-in text"
    if not path.is_file():
        raise UserError(f"evaluation.needles.haystack={path}: no such file; {remedy}")
    try:
        found = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(found)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"evaluation.needles.haystack={path}: no UTF-8 text, or JSON without a `text` "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"evaluation.needles.haystack={path}: it holds no text; {remedy}")
    return found


def _docstrings() -> str:
    found = []
    for path in text.builtin_corpus(seed=0).val:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some modules are there to be broken
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        found += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return " ".join(found)


# ---- prompts -----------------------------------------------------------------------------


def depths(count: int) -> list[float]:
    """Evenly spread whole percents from 0 to 100; one alone is the middle. RULER has 40."""
    return [50.0] if count == 1 else np.round(np.linspace(0, 100, count)).tolist()


def hide(sentences: Sequence[str], joint: str, needle: str, depth: float) -> tuple[str, str]:
    """The haystack before the needle, and from it on: the needle stands between two sentences."""
    place = int(len(sentences) * depth / 100)
    before = "".join(sentence + joint for sentence in sentences[:place])
    return before, joint.join([needle, *sentences[place:]])


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

    As in RULER the haystack is as much of the text's beginning as fits. What is hidden is a
    function of seed, task, length, depth and sample alone. Raises a UserError where not one
    sentence fits, or the text is too short.
    """
    kind = TASKS[task].value_type
    most = length - tokens_to_generate
    count = 0
    prompts = []
    for depth in depths:
        for sample in range(samples):
            rng = random.Random(f"{seed}/{task}/{length}/{depth}/{sample}")
            key = f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_NOUNS.split())}"
            build = partial(_prompt, haystack, tokenizer, kind, key, _value(kind, rng), depth)
            count = count or _sentences_that_fit(build, haystack, task, most, length)
            prompt = build(count)
            while len(prompt.tokens) > most and count > 1:  # another key may be longer
                count -= 1
                prompt = build(count)
            prompts.append(prompt)
    return prompts


def _prompt(
    haystack: Haystack,
    tokenizer: AbstractTokenizer,
    value_type: str,
    key: str,
    value: str,
    depth: float,
    count: int,
) -> Prompt:
    """The one with the first `count` sentences of the haystack."""
    words = {"value_type": value_type, "key": key}
    needle = NEEDLE.format(**words, value=value)
    sentences = haystack.sentences * count if haystack.endless else haystack.sentences[:count]
    head, tail = CONTEXT.format(**words, context="{context}").split("{context}")
    before, after = hide(sentences, haystack.joint, needle, depth)
    question = tail + QUESTION.format(**words) + ANSWER_PREFIX.format(**words)
    ids = tokenizer.encode(head + before + after + question)
    tokens = np.concatenate([np.array([tokenizer.bos_token_id], np.int32), ids])
    return Prompt(tokens, value, depth, 1 + len(tokenizer.encode(head + before)))


def _sentences_that_fit(
    build: Callable[[int], Prompt], haystack: Haystack, task: str, most: int, length: int
) -> int:
    """The largest number of sentences with which a prompt has at most `most` tokens."""

    def size(count: int) -> int:
        return len(build(count).tokens)

    if size(1) > most:
        raise UserError(
            f"evaluation.needles.lengths={length}: the shortest prompt of {task} takes {size(1)} "
            f"tokens, and its answer {length - most}; give at least {size(1) + length - most}"
        )
    available = sys.maxsize if haystack.endless else len(haystack.sentences)
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


def _value(kind: str, rng: random.Random) -> str:
    """Seven digits, or a random UUID."""
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


# ---- scores ------------------------------------------------------------------------------


def holds(prediction: str, answer: str) -> bool:
    """RULER's string match with one answer: whether it occurs anywhere, in any case of letters."""
    return answer.lower() in _UNPRINTABLE.sub("\n", prediction.strip()).strip().lower()
