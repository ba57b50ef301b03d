"""Dotted globs: which parameters and which settings a name pattern selects.

`*` stands for any text within one segment, `**` for any number of segments, none included.
"""

import re
from fnmatch import fnmatchcase

_SEGMENT = re.compile(r"\*\*|\*?(?:\w+\*?)*", re.ASCII)


def matches(glob: str, name: str) -> bool:
    """Whether `glob` selects the dotted `name`, as `**.w1.*` selects `h.blocks.w1.weight`."""
    return _match(glob.split("."), name.split("."))


def is_glob(text: str) -> bool:
    """Whether `text` has segments of letters, digits, `_` and `*` only, with `**` on its own."""
    return all(part and _SEGMENT.fullmatch(part) for part in text.split("."))


def _match(pattern: list[str], segments: list[str]) -> bool:
    if not pattern:
        return not segments
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return any(_match(rest, segments[i:]) for i in range(len(segments) + 1))
    return bool(segments) and fnmatchcase(segments[0], head) and _match(rest, segments[1:])
