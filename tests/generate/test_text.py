"""Text is yielded once, as soon as it is final, and up to a stop string."""

import pytest

from xlstm_jax.data import tokenizers
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import Generation
from xlstm_jax.generate.text import stream_text, text_parts

BYTES = tokenizers.get("byte")


def stream_parts(pieces, stop=()):
    return list(text_parts((Generation([list(p)], None, []) for p in pieces), BYTES, stop))


def test_every_piece_is_yielded_immediately():
    assert stream_parts([b"one ", b"two ", b"three"]) == ["one ", "two ", "three", ""]


def test_character_is_yielded_when_all_its_bytes_have_arrived():
    euro = "\N{EURO SIGN}".encode()
    assert stream_parts([b"5 " + euro[:1], euro[1:2], euro[2:] + b"!"]) == [
        "5 ",
        "\N{EURO SIGN}!",
        "",
    ]


def test_incomplete_character_is_yielded_at_the_end():
    assert "".join(stream_parts([b"a\xe2", b"\x82"])) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("pieces", "text"),
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
def test_stop_string_ends_the_text_and_no_part_of_it_is_yielded(pieces, text):
    parts = stream_parts([*pieces], stop=["END", "STOP"])
    assert "".join(parts) == text
    assert not any("E" in part for part in parts) or text == "one ENEMY" or text == "one EN"


def test_end_of_document_token_is_not_text():
    assert "".join(stream_parts([[*b"end", 256]])) == "end"


def test_ids_that_pad_the_vocabulary_of_the_model_are_not_text():
    assert "".join(stream_parts([[*b"en", 257, 300, *b"d"]])) == "end"


def test_no_piece_is_decoded_after_a_stop_string():
    def pieces():
        yield Generation([list(b"a END")], None, [])
        raise AssertionError("the text had ended")

    assert list(text_parts(pieces(), BYTES, ["END"])) == ["a "]


@pytest.mark.usefixtures("unchecked_types")
def test_empty_stop_string_is_rejected():
    with pytest.raises(ArgumentError, match="stop must have no empty string, got ''"):
        stream_text(None, None, BYTES, "a", stop=["END", ""])
