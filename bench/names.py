"""Arguments of the command line that name one or more of something."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable


def names_of(known: Iterable[str], **words: list[str]) -> Callable[[str], list[str]]:
    """A type for argparse: "a,b" → ["a", "b"], each of ``known``. A word stands for all of its list, as in
    ``names_of(SETS, all=list(SETS))``.
    """
    known = list(known)

    def names(text: str) -> list[str]:
        if text in words:
            return words[text]
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join([*known, *words])}")
        return found

    return names
