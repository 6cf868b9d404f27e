"""Text is said once, as soon as it is settled, and not beyond a stop text."""

import pytest

from xlstm_jax.data import tokenizers
from xlstm_jax.generate import Generation
from xlstm_jax.generate.text import _parts

BYTES = tokenizers.get("byte")


def say(pieces, stop=()):
    return list(_parts((Generation([list(p)], None) for p in pieces), BYTES, stop))


def test_each_piece_is_said_when_it_comes():
    assert say([b"one ", b"two ", b"three"]) == ["one ", "two ", "three", ""]


def test_a_character_is_said_when_all_its_bytes_are_there():
    euro = "\N{EURO SIGN}".encode()
    assert say([b"5 " + euro[:1], euro[1:2], euro[2:] + b"!"]) == ["5 ", "\N{EURO SIGN}!", ""]


def test_bytes_that_never_become_a_character_are_said_at_the_end():
    assert "".join(say([b"a\xe2", b"\x82"])) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        ([b"one END two"], "one "),
        ([b"one E", b"ND two"], "one "),
        ([b"one E", b"N", b"D"], "one "),
        ([b"one EN", b"EMY"], "one ENEMY"),
        ([b"one EN"], "one EN"),
        ([b"END"], ""),
        ([b"a STOP b END"], "a "),
    ],
)
def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_said(pieces, answer):
    parts = say([*pieces], stop=["END", "STOP"])
    assert "".join(parts) == answer
    assert not any("E" in part for part in parts) or answer == "one ENEMY" or answer == "one EN"


def test_the_end_of_a_document_is_not_text():
    assert "".join(say([[*b"end", 256]])) == "end"


def test_no_piece_is_asked_for_after_a_stop_text():
    def pieces():
        yield Generation([list(b"a END")], None)
        raise AssertionError("the answer was over")

    assert list(_parts(pieces(), BYTES, ["END"])) == ["a "]
