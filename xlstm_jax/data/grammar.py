"""A generated corpus: English-like sentences from a seeded grammar.

It is in the public domain and has the same bytes on every machine. A model can learn spelling,
subject-verb agreement, matched parentheses and arithmetic from it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xlstm_jax.data import hashing
from xlstm_jax.data.documents.document import Document

_NUM_DOCUMENTS, _NUM_SENTENCES = 200, 40

# Changing these words or the order of draws changes the text; a test pins its hash.
_NOUNS = "cell gate river teacher garden sparrow engine number letter window clock".split()
_ADJECTIVES = "old quiet bright narrow patient green hidden early careful empty".split()
_VERBS = "follow remember forget open watch carry answer find write count".split()
_PHRASES = "in the house|under the bridge|near the sea|behind the hill|before noon".split("|")
_CONJUNCTIONS = "and then|because|while|so|but".split("|")

Draw = Callable[[Sequence[Any]], Any]  # returns one of the choices


@functools.cache
def documents() -> tuple[Document, ...]:
    """All documents, 0.4 MB in total."""
    texts = []
    for number in range(_NUM_DOCUMENTS):
        draw = _draws(number)
        sentences = (_sentence(draw) for _ in range(_NUM_SENTENCES))
        texts.append(Document(f"{number:03d}", "\n".join(sentences).encode() + b"\n"))
    return tuple(texts)


def _draws(number: int) -> Draw:
    """Random draws for one document; draw i depends only on the document's number and on i."""
    # A sentence takes fewer than 30 draws; unused keys cost little.
    keys = hashing.fold(hashing.key(number), np.arange(30 * _NUM_SENTENCES, dtype=np.uint64))
    stream: Iterator[int] = iter(keys.tolist())

    def draw(choices: Sequence[Any]) -> Any:
        return choices[next(stream) % len(choices)]

    return draw


def _sentence(draw: Draw) -> str:
    if draw((False, False, True)):
        a, b = int(draw("123456789") + draw("0123456789")), int(draw("0123456789"))
        return f"{a} + {b} = {a + b}, and {a} - {b} = {a - b}."
    clauses = _clause(draw)
    if draw((False, True)):
        clauses += f" {draw(_CONJUNCTIONS)} {_clause(draw)}"
    return clauses[0].upper() + clauses[1:] + "."


def _clause(draw: Draw) -> str:
    plural = draw((False, True))
    verb = draw(_VERBS)
    if not plural:
        third_person = {"carry": "carries", "watch": "watches"}
        verb = third_person.get(verb, verb + "s")
    aside = f" ({draw(_PHRASES)})" if draw((False, False, False, True)) else ""
    return f"{_noun(draw, plural=plural)}{aside} {verb} {_noun(draw, plural=draw((False, True)))}"


def _noun(draw: Draw, *, plural: bool) -> str:
    noun = draw(_NOUNS) + ("s" if plural else "")
    article = draw(("the", "some" if plural else "every"))
    return f"{article} {draw(_ADJECTIVES)} {noun}" if draw((False, True)) else f"{article} {noun}"
