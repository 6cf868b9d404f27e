"""A damaged file of a tokenizer loads, or is refused in one line; it never ends the process."""

import base64
import contextlib
import json
import random
import struct

import pytest

from tests.data import tokenizer_files as make
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_value
from xlstm_jax.data import tokenizers
from xlstm_jax.errors import ConfigError

NUMBERS = [
    pytest.param(range(20)),
    pytest.param(range(20, 400), marks=pytest.mark.slow),
]
TEXT = 'def f(x):\n  return "gr\u00f6\u00dfer \u6728 \U0001f642" + x  # \u2581 </s> <0x41>\n'
_CLAIMS = (0, 1, 4, 127, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)


def use(folder) -> bool:
    """Whether a tokenizer loads and works; else it must raise a ConfigError of one line."""
    try:
        tokenizer = tokenizers.get(str(folder))
        ids = tokenizer.encode(TEXT)
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size
        assert tokenizer.num_bytes(ids) >= 0
        tokenizer.decode(ids)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[start]
        value, shift, start = value | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128:
            return value, start


def varint(value: int) -> bytes:
    head = bytes([value & 127 | 128]) if value > 127 else bytes([value])
    return head + (varint(value >> 7) if value > 127 else b"")


def parse(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a message of protocol buffers."""
    fields, start = [], 0
    while start < len(data):
        tag, start = read_varint(data, start)
        if tag & 7 == 0:
            value, start = read_varint(data, start)
        else:
            size, start = (
                read_varint(data, start) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], start)
            )
            value, start = data[start : start + size], start + size
        fields.append((tag, value))
    return fields


def dump(fields: list[tuple[int, int | bytes]]) -> bytes:
    parts = []
    for tag, value in fields:
        if isinstance(value, int):
            parts.append(varint(tag) + varint(value))
        else:
            parts.append(varint(tag) + (varint(len(value)) if tag & 7 == 2 else b"") + value)
    return b"".join(parts)


def mutate_model(data: bytes, rng: random.Random) -> bytes:
    """A model with fields removed, repeated, moved or changed, down to its nested messages."""
    fields = parse(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not fields:
            break
        # The settings are behind thousands of pieces.
        i = rng.choice((rng.randrange(len(fields)), len(fields) - 1 - rng.randrange(3)))
        tag, value = fields[i]
        kind = rng.randrange(10)
        if kind == 0:
            del fields[i]
        elif kind == 1:
            fields.insert(rng.randrange(len(fields)), (tag, value))
        elif isinstance(value, int):
            fields[i] = (tag, rng.choice(_CLAIMS))
        elif tag & 7 != 2:
            floats = (float("nan"), float("inf"), 3e38, -3e38)
            fields[i] = (tag, struct.pack("<f", rng.choice(floats)).ljust(len(value), b"\0"))
        elif kind == 2:
            claim = rng.choice((*_CLAIMS, len(value), len(value) // 2)) % (1 << 32)
            fields[i] = (tag, struct.pack("<I", claim) + value[4:])
        else:
            with contextlib.suppress(IndexError, KeyError):  # a text is no message
                fields[i] = (tag, mutate_model(value, rng))
                continue
            fields[i] = (tag, mutate_bytes(value, rng))
    return dump(fields)


def unigram() -> bytes:
    """A tokenizer.json in the layout of T5: a table of normalization, and scored pieces."""
    import sentencepiece

    model = make.sentencepiece_model("unigram", "nmt_nfkc")
    normalizer = next(value for tag, value in parse(model) if tag >> 3 == 3)
    assert isinstance(normalizer, bytes)
    table = next(value for tag, value in parse(normalizer) if tag >> 3 == 2)
    assert isinstance(table, bytes)
    inner = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = [[inner.id_to_piece(i), inner.get_score(i)] for i in range(inner.get_piece_size())]
    normalizers = [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace | {"split": True},
        "post_processor": None,
        "decoder": metaspace | {"split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
    }
    return json.dumps(values).encode()


JSON_KINDS = {
    "byte_level_bpe": make.byte_level_bpe,
    "metaspace_bpe": make.metaspace_bpe,
    "word_piece": make.word_piece,
    "unigram": unigram,
}


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_an_undamaged_tokenizer_json_loads(tmp_path, kind):
    eos = {"eos_token": "[SEP]"} if kind == "word_piece" else {}
    tokenizer = tokenizers.get(make.write_folder(tmp_path, JSON_KINDS[kind](), **eos))
    assert tokenizer.encode(TEXT).size > 5


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("kind", JSON_KINDS)
def test_a_damaged_tokenizer_json_is_refused(tmp_path, kind, numbers):
    values = json.loads(JSON_KINDS[kind]())
    vocab = values["model"].pop("vocab")
    merges = values["model"].pop("merges", None)
    refused = 0
    for number in numbers:
        rng = random.Random(number)
        # Nearly all values of the file are in the vocabulary; damage the other ones as often.
        changed = mutate_value(values, rng) if number % 2 else values
        if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
            lists = {"vocab": vocab} | ({} if merges is None else {"merges": merges})
            changed = {**changed, "model": {**lists, **changed["model"]}}
        data = json.dumps(changed).encode() if number % 2 else mutate_json(changed, rng)
        (tmp_path / "tokenizer.json").write_bytes(data)
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[SEP]"}')
        if kind != "word_piece":
            (tmp_path / "tokenizer_config.json").unlink()
        refused += not use(tmp_path)
    assert refused > len(numbers) / 10


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize(
    ("kind", "rule"), [("unigram", "identity"), ("bpe", "identity"), ("unigram", "nmt_nfkc")]
)
def test_a_damaged_sentencepiece_model_is_refused(tmp_path, kind, rule, numbers, capfd):
    data = make.sentencepiece_model(kind, rule)
    assert dump(parse(data)) == data
    refused = 0
    for number in numbers:
        rng = random.Random(number)
        mutate = mutate_model if number % 3 else mutate_bytes
        (tmp_path / "tokenizer.model").write_bytes(mutate(data, rng))
        refused += not use(tmp_path)
    assert refused > len(numbers) / 10


@pytest.mark.parametrize(
    "numbers", [NUMBERS[0], pytest.param(range(20, 1200), marks=pytest.mark.slow)]
)
def test_damaged_settings_are_refused(tmp_path, numbers):
    settings = {
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "bos_token": "<|endoftext|>",
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>"}},
        "chat_template": "{{ messages }}",
        "model_max_length": 1e30,
    }
    make.write_folder(tmp_path, make.byte_level_bpe())
    refused = 0
    for number in numbers:
        data = mutate_json(settings, random.Random(number))
        (tmp_path / "tokenizer_config.json").write_bytes(data)
        refused += not use(tmp_path)
    assert refused > len(numbers) / 10
