"""A generated corpus: English-like sentences from a seeded grammar.

Public domain, and the same bytes on every machine. It is small and simple, yet has structure to
learn: spelling, agreement in number, matched brackets, correct sums.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from xlstm_jax.data import hashing
from xlstm_jax.data.readers import Document

_NUM_DOCUMENTS, _NUM_SENTENCES = 200, 40

# Any change of these words or of the order of draws changes the text, whose hash a test pins.
_NOUNS = "cell gate river teacher garden sparrow engine number letter window clock".split()
_ADJECTIVES = "old quiet bright narrow patient green hidden early careful empty".split()
_VERBS = "follow remember forget open watch carry answer find write count".split()
_PHRASES = "in the house|under the bridge|near the sea|behind the hill|before noon".split("|")
_CONJUNCTIONS = "and then|because|while|so|but".split("|")

Draw = Callable[[Sequence[str]], str]  # returns one of the choices


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
    """Draws for one document; draw i is a function of the document's number and of i alone."""
    # A sentence takes fewer than 30 draws; unused keys cost little.
    keys = hashing.fold(hashing.key(number), np.arange(30 * _NUM_SENTENCES, dtype=np.uint64))
    stream: Iterator[int] = iter(keys.tolist())

    def draw(choices: Sequence[str]) -> str:
        return choices[next(stream) % len(choices)]

    return draw


def _sentence(draw: Draw) -> str:
    if draw("aab") == "b":
        a, b = int(draw("123456789") + draw("0123456789")), int(draw("0123456789"))
        return f"{a} + {b} = {a + b}, and {a} - {b} = {a - b}."
    clauses = _clause(draw)
    if draw("ab") == "b":
        clauses += f" {draw(_CONJUNCTIONS)} {_clause(draw)}"
    return clauses[0].upper() + clauses[1:] + "."


def _clause(draw: Draw) -> str:
    plural = draw("ab") == "b"
    verb = draw(_VERBS)
    if not plural:
        third_person = {"carry": "carries", "watch": "watches"}
        verb = third_person.get(verb, verb + "s")
    aside = f" ({draw(_PHRASES)})" if draw("aaab") == "b" else ""
    return f"{_noun(draw, plural=plural)}{aside} {verb} {_noun(draw, plural=draw('ab') == 'b')}"


def _noun(draw: Draw, *, plural: bool) -> str:
    noun = draw(_NOUNS) + ("s" if plural else "")
    article = draw(("the", "some" if plural else "every"))
    return f"{article} {draw(_ADJECTIVES)} {noun}" if draw("ab") == "b" else f"{article} {noun}"
