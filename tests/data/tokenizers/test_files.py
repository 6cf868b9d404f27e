"""Tokenizers from files: ids of the library, bytes of tokens, the eos token, saving and loading."""

import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import tokenizer_files as make
from xlstm_jax.data import tokenizers
from xlstm_jax.data.tokenizers import files, from_file
from xlstm_jax.errors import ConfigError, NetworkError
from xlstm_jax.generate import Generation
from xlstm_jax.generate.text import text_parts

KINDS = {
    "byte_level": make.byte_level_bpe,
    "metaspace": make.metaspace_bpe,
    "sentencepiece_unigram": make.sentencepiece_model,
    "sentencepiece_bpe": lambda: make.sentencepiece_model("bpe"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        kind: tokenizers.get(make.write_folder(folder / kind, data()))
        for kind, data in KINDS.items()
    }


def with_added_tokens(data, *tokens):
    """The tokenizer.json with further tokens: (id, content, whether it is special)."""
    values = json.loads(data)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"] += [
        {"id": i, "content": content, "special": special, **flags} for i, content, special in tokens
    ]
    return json.dumps(values).encode()


@every_kind
def test_a_tokenizer_satisfies_the_protocol(loaded, kind):
    tokenizer = loaded[kind]
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert len(tokenizer.sha256) == 64


def test_ids_are_those_of_the_tokenizers_library_whatever_the_file_truncates_and_pads(tmp_path):
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_str(make.byte_level_bpe().decode())
    expected = [library.encode(text, add_special_tokens=False).ids for text in make.TEXTS]
    library.enable_truncation(3)
    library.enable_padding(length=7)
    library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = tokenizers.get(make.write_folder(tmp_path, library.to_str().encode()))
    assert [tokenizer.encode(text).tolist() for text in make.TEXTS] == expected
    batch = tokenizer.encode_batch([text.encode() for text in make.TEXTS])
    assert [ids.tolist() for ids in batch] == expected


def test_ids_are_those_of_the_sentencepiece_library(loaded):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=make.sentencepiece_model())
    expected = [library.encode(text, out_type=int) for text in make.TEXTS]
    tokenizer = loaded["sentencepiece_unigram"]
    assert [tokenizer.encode(text).tolist() for text in make.TEXTS] == expected
    batch = tokenizer.encode_batch([text.encode() for text in make.TEXTS])
    assert [ids.tolist() for ids in batch] == expected


def test_merges_that_the_file_drops_at_random_are_all_applied(tmp_path):
    values = json.loads(make.byte_level_bpe())
    values["model"]["dropout"] = 0.9
    tokenizer = tokenizers.get(make.write_folder(tmp_path / "a", json.dumps(values).encode()))
    plain = tokenizers.get(make.write_folder(tmp_path / "b", make.byte_level_bpe()))
    np.testing.assert_array_equal(tokenizer.encode(make.corpus()), plain.encode(make.corpus()))


@every_kind
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(loaded, kind):
    # All but the byte-level one add a space before a text, which is a token's byte.
    added = kind != "byte_level"

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.text(max_size=40) | st.text("ab \n\u00e9\u6728", min_size=1, max_size=40))
    def check(text):
        text = text.replace("\u2581", "").replace("\0", "").removeprefix("<|endoftext|>")
        ids = loaded[kind].encode(text)
        expected = len(text.encode()) + (added if text else 0)
        assert loaded[kind].num_bytes(ids) == expected
        assert loaded[kind].decode(ids) == text

    check()


def test_bytes_of_word_pieces_are_those_that_they_add_to_the_text(tmp_path):
    folder = make.write_folder(tmp_path, make.word_piece(), eos_token="[SEP]")
    tokenizer = tokenizers.get(folder)
    text = "a text that is wrapped, without punctuation"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split())  # some words have several pieces
    assert tokenizer.num_bytes(ids) == len(" " + tokenizer.decode(ids))


def test_added_tokens_count(tmp_path):
    tokens = (600, "   \u00e9", False), (601, "<|user|>", True)
    data = with_added_tokens(make.byte_level_bpe(), *tokens)
    tokenizer = tokenizers.get(make.write_folder(tmp_path, data))
    assert tokenizer.vocab_size == 602 and tokenizer.token_bytes.shape == (602,)
    ids = tokenizer.encode("<|user|>a   \u00e9<|user|>")
    assert ids[0] == ids[-1] == 601 and 600 in ids
    assert tokenizer.num_bytes(ids) == 6 and tokenizer.decode(ids) == "a   \u00e9"


@every_kind
def test_text_is_streamed_with_its_spaces_and_its_characters_of_several_tokens(loaded, kind):
    tokenizer, text = loaded[kind], "two words \u6728\U0001f642 end"
    ids = tokenizer.encode(text).tolist()
    prompt = tokenizer.encode("two").tolist()
    assert ids[: len(prompt)] == prompt
    pieces = [Generation([[i]], None, []) for i in ids[len(prompt) :]]
    parts = list(text_parts(pieces, tokenizer, (), prompt))
    assert "".join(parts) == " words \u6728\U0001f642 end"
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@every_kind
def test_special_tokens_have_no_text(loaded, kind):
    tokenizer = loaded[kind]
    ids = [*tokenizer.encode("one").tolist(), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "one"


@every_kind
@pytest.mark.parametrize("invalid", [-1, 10**6, 65536 + 104])
def test_an_unknown_id_is_rejected(loaded, kind, invalid):
    for method in (loaded[kind].decode, loaded[kind].num_bytes):
        with pytest.raises(ConfigError, match=rf"ids must be in 0\.\.\d+ .*, got {invalid}; dec"):
            method([0, invalid])


@every_kind
def test_invalid_utf8_is_rejected_with_its_position(loaded, kind):
    for text in (b"ab\xff", "ab\udcff"):
        with pytest.raises(ConfigError, match="text must be UTF-8 .* but byte 2 is not; correct"):
            loaded[kind].encode(text)
    with pytest.raises(ConfigError, match=r"no surrogates, got U\+D800 at character 1; remove"):
        loaded[kind].encode("a\ud800")


def test_ids_take_two_bytes_up_to_65536_of_them(loaded):
    tokenizer = loaded["byte_level"]
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        assert dataclasses.replace(tokenizer, vocab_size=size).encode("abc").dtype == dtype


@every_kind
def test_a_saved_tokenizer_is_the_same(loaded, kind, tmp_path):
    loaded[kind].save(tmp_path / "saved")
    again = tokenizers.get(str(tmp_path / "saved"))
    for name in ("name", "sha256", "vocab_size", "eos_id"):
        assert getattr(again, name) == getattr(loaded[kind], name)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {again.name, "tokenizer_config.json"}


def test_saving_keeps_the_eos_token_the_settings_and_the_template(tmp_path):
    data = with_added_tokens(make.byte_level_bpe(), (600, "<stop>", True))
    folder = make.write_folder(tmp_path / "a", data, chat_template="unused", bos_token=None)
    (tmp_path / "a" / "special_tokens_map.json").write_text('{"eos_token": "<stop>"}')
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ 1 }}")
    tokenizers.get(folder).save(tmp_path / "b")
    again = tokenizers.get(str(tmp_path / "b"))
    assert again.eos_id == 600
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ 1 }}"
    stored = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert stored == {"chat_template": "unused", "eos_token": "<stop>"}


def test_the_byte_tokenizer_saves_nothing(tmp_path):
    tokenizers.get("byte").save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@every_kind
def test_a_tokenizer_can_be_sent_to_another_process(loaded, kind):
    again = pickle.loads(pickle.dumps(loaded[kind]))
    np.testing.assert_array_equal(again.encode(make.corpus()), loaded[kind].encode(make.corpus()))


@pytest.mark.parametrize(
    "value", ["<stop>", {"content": "<stop>", "__type": "AddedToken"}], ids=["text", "table"]
)
def test_the_settings_name_the_eos_token(tmp_path, value):
    data = with_added_tokens(make.byte_level_bpe(), (600, "<stop>", False))
    tokenizer = tokenizers.get(make.write_folder(tmp_path, data, eos_token=value))
    assert tokenizer.eos_id == 600
    # It has no text, although the file does not call it special.
    assert tokenizer.num_bytes([600]) == 0 and tokenizer.decode([600]) == ""


def test_the_eos_token_is_that_of_the_model_or_a_well_known_one(loaded):
    assert loaded["byte_level"].eos_token == "<|endoftext|>"
    assert loaded["metaspace"].eos_token == loaded["sentencepiece_bpe"].eos_token == "</s>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"needs a token .* but no eos token is named; write {\"eos_token\": \"TOKEN\"} to tok",
        ),
        ({"eos_token": "<nothing>"}, "needs a token .* but eos_token='<nothing>'; write"),
        ({"eos_token": 5}, "eos_token must be a token, got 5; correct it"),
        ({"eos_token": ""}, "eos_token must be a token, got ''; correct it"),
        ({"eos_token": "\ud800"}, r"tokenizer_config.json is not valid JSON .*surrogates not all"),
    ],
)
def test_a_vocabulary_without_eos_token_is_rejected(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        tokenizers.get(make.write_folder(tmp_path, make.word_piece(), **settings))


def test_a_path_is_a_file_or_a_folder_and_json_has_precedence(tmp_path):
    folder = make.write_folder(tmp_path, make.sentencepiece_model())
    assert tokenizers.get(folder).name == "tokenizer.model"
    make.write_folder(tmp_path, make.byte_level_bpe())
    assert tokenizers.get(folder).name == "tokenizer.json"
    assert tokenizers.get(f"{folder}/tokenizer.model").name == "tokenizer.model"
    assert tokenizers.get(f"{folder}/tokenizer.json").name == "tokenizer.json"


def test_a_changed_file_is_read_again(tmp_path):
    folder = make.write_folder(tmp_path, make.byte_level_bpe())
    first = tokenizers.get(folder)
    assert tokenizers.get(folder) is first
    make.write_folder(tmp_path, with_added_tokens(make.byte_level_bpe(), (600, "<x>", False)))
    assert tokenizers.get(folder).vocab_size == 601


def test_a_name_of_the_hub_is_downloaded_once(tmp_path, monkeypatch):
    import huggingface_hub

    folder, calls = make.write_folder(tmp_path, make.byte_level_bpe()), []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision, "tokenizer.json" in allow_patterns))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        assert tokenizers.get("hf://some/model@v1").name == "tokenizer.json"
    assert calls == [("some/model", "v1", True)]


def test_a_failed_download_is_one_line(monkeypatch):
    import huggingface_hub

    def download(name, *, revision, allow_patterns):
        raise RuntimeError("broken\npipe")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(NetworkError, match="hf://no/model cannot be .*RuntimeError: broken p"):
        tokenizers.get("hf://no/model")


@pytest.mark.parametrize(
    ("package", "data"),
    [("tokenizers", make.byte_level_bpe), ("sentencepiece", make.sentencepiece_model)],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, data):
    folder = make.write_folder(tmp_path, data())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"needs the package {package}, .*pip install 'xlstm-jax"):
        tokenizers.get(folder)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="needs the package huggingface_hub, .*`pip install"):
        tokenizers.get("hf://no/package")


def test_folders_without_one_tokenizer_are_rejected(tmp_path):
    with pytest.raises(
        ConfigError, match=r"has neither tokenizer.json nor \*.model; give the path"
    ):
        tokenizers.get(str(tmp_path))
    (tmp_path / "a.model").touch()
    (tmp_path / "b.model").touch()
    with pytest.raises(ConfigError, match=r"has 2 files \*.model; give the path of the file"):
        tokenizers.get(str(tmp_path))


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="must have at most 1,000 bytes to be the file of a tok"):
        tokenizers.get(make.write_folder(tmp_path, make.byte_level_bpe()))


def with_id(data, i):
    """The tokenizer.json of a WordPiece with another id for one token."""
    values = json.loads(data)
    values["model"]["vocab"]["the"] = i
    return json.dumps(values).encode()


def test_ids_may_have_gaps(tmp_path):
    data = with_id(make.word_piece(), 70_000)
    tokenizer = tokenizers.get(make.write_folder(tmp_path, data, eos_token="[SEP]"))
    assert tokenizer.vocab_size == 70_001 and tokenizer.encode("the").tolist() == [70_000]
    assert tokenizer.num_bytes([70_000, 69_999]) == len(" the")


def test_an_id_that_no_file_can_have_is_rejected(tmp_path):
    data = with_id(make.word_piece(), from_file.MAX_VOCAB)
    with pytest.raises(
        ConfigError, match=r"must have ids in 0\.\.16777215, got 16,777,217 of them"
    ):
        tokenizers.get(make.write_folder(tmp_path, data))


def test_a_token_that_overflows_the_stack_of_the_library_is_rejected(tmp_path):
    values = json.loads(make.byte_level_bpe())
    values["model"] = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["</s>", 0.0], ["x" * 1_000_000, -1.0]],
    }
    with pytest.raises(ConfigError, match="at most 16,384 characters, got one of 1,000,000; fetch"):
        tokenizers.get(make.write_folder(tmp_path, json.dumps(values).encode()))


def test_half_of_a_surrogate_pair_of_which_the_library_aborts_is_rejected(tmp_path):
    values = json.loads(make.byte_level_bpe())
    values["model"]["merges"][0][0] = "\ud800"
    with pytest.raises(ConfigError, match="is not valid JSON .*surrogates not allowed"):
        tokenizers.get(make.write_folder(tmp_path, json.dumps(values).encode()))
    values["model"]["vocab"] = {"<|endoftext|>": 0, "\U0001f642": 1}  # spelled as a pair
    values["model"]["merges"] = []
    folder = make.write_folder(tmp_path, json.dumps(values).encode())
    assert tokenizers.get(folder).vocab_size == 2


@pytest.mark.parametrize("merge", [["a", "\u0120"], "a \u0120"])
def test_a_merge_without_its_prefix_of_which_the_library_aborts_is_rejected(tmp_path, merge):
    values = json.loads(make.byte_level_bpe())
    values["model"] |= {"continuing_subword_prefix": "#", "merges": [merge]}
    with pytest.raises(ConfigError, match="start with continuing_subword_prefix='#', got .*a"):
        tokenizers.get(make.write_folder(tmp_path, json.dumps(values).encode()))
    values["model"] |= {"vocab": {"</s>": 0, "a": 1, "#b": 2, "ab": 3}, "merges": [["a", "#b"]]}
    values["added_tokens"] = []
    assert tokenizers.get(make.write_folder(tmp_path, json.dumps(values).encode())).vocab_size == 4


@pytest.mark.parametrize("table", ["////AAAA", "A", "\u00e9", None, 5, []])
def test_a_table_of_normalization_that_claims_more_than_the_file_has_is_rejected(tmp_path, table):
    values = json.loads(make.byte_level_bpe())
    part = {"type": "Precompiled", "precompiled_charsmap": table}
    values["normalizer"] = {"type": "Sequence", "normalizers": [part]}
    with pytest.raises(ConfigError, match="precompiled_charsmap must be the table of a normalizer"):
        tokenizers.get(make.write_folder(tmp_path, json.dumps(values).encode()))


def test_added_tokens_beside_a_sentencepiece_model_are_rejected(tmp_path):
    added = {"3": {"content": "a"}, "450": {"content": "<|user|>"}}
    folder = make.write_folder(tmp_path, make.sentencepiece_model(), added_tokens_decoder=added)
    with pytest.raises(
        ConfigError, match="adds the token '450', but the model has 450 pieces; sav"
    ):
        tokenizers.get(folder)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"model": 1}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_no_tokenizer_is_rejected(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=name):
        tokenizers.get(str(tmp_path / name))
