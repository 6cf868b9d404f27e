"""The record of a mutation."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """Replaces `old`, which occurs once in `file`, by `new`; `test` are arguments of pytest."""

    file: str
    old: str
    new: str
    test: str
