"""Sessions continue as if copies, rewinds and files had never been; altered files are refused."""

import dataclasses
import errno
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.conversations import BYTES, LETTERS, VOCAB_SIZE, model_and_variables
from tests.modules.models import MIXED_BASELINES, config
from xlstm_jax.config import ConfigError
from xlstm_jax.data.tokenizers import ByteTokenizer
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import Sampler, Session, container, generate, prefill
from xlstm_jax.modules import LM

safetensors = pytest.importorskip("safetensors")


@pytest.fixture(scope="module", autouse=True)
def single_prefill_width():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WIDTHS", (16,))
        yield


def new(tokenizer=BYTES, **options):
    return Session(*model_and_variables(), tokenizer, **options)


def say(session, text, count=12, **options):
    session.append(text)
    return session.generate(count, sampler=LETTERS, key=jax.random.key(3), **options)


def assert_same(session, other):
    """The sessions have equal tokens and bit-identical states, also those to rewind to."""
    assert session.tokens == other.tokens
    points, others = ([*s._snapshots, s._point] for s in (session, other))
    assert [p._replace(state=None) for p in points] == [p._replace(state=None) for p in others]
    for point, expected in zip(points, others, strict=True):
        chex.assert_trees_all_equal(point.state, expected.state)


def stored(session, folder):
    """The session, written and read again."""
    path = folder / "a.safetensors"
    session.save(path)
    return Session.load(path, session.model, session.variables, session.tokenizer)


def detours(session, folder):
    """A session after operations that must have no effect on what follows."""
    copy, other = session.fork(2)
    say(other, "elsewhere")
    say(copy, "a text that is rewound")
    copy.rewind()
    say(copy, "two")
    copy.append("texts")
    copy.rewind(2)
    return stored(copy, folder).fork(1)[0]


@pytest.mark.parametrize(
    "pattern, changes",
    [
        ("w", {}),
        pytest.param("aM", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(
            "msM" + MIXED_BASELINES + "l", {"dtype": "bfloat16"}, marks=pytest.mark.exhaustive
        ),
    ],
    ids=["float32", "bfloat16", "every kind in bfloat16"],
)
def test_copies_rewinds_and_files_have_no_effect_on_what_follows(pattern, changes, tmp_path):
    plain = Session(*model_and_variables(pattern, **changes), BYTES)
    winding = detours(plain, tmp_path)
    for text in ("one question?", "x", "and a third one, which is longer than a pass."):
        assert say(plain, text) == say(winding, text)
        winding = detours(winding, tmp_path)
    assert_same(plain, winding)
    assert plain.num_snapshots == 3
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(plain._point.state)}
    assert dtypes == {"float32", "int32", *changes.values()}


def test_copies_are_independent():
    session = new()
    say(session, "a text.")
    before = session.tokens
    first, second = session.fork(2)
    say(first, "yes")
    assert session.tokens == second.tokens == before
    second.rewind()
    assert second.tokens == [] and session.tokens == before
    say(session, "yes")
    assert_same(session, first)


def test_answers_are_those_of_generate():
    """The state is passed on: the answers equal those after the full text in one prompt."""
    session, text = new(), ""
    for question in ("what?", "and why is that so?"):
        text += question
        answer = say(session, question, 8)
        key = jax.random.fold_in(jax.random.key(3), 0)[None]
        options = dict(max_new_tokens=8, sampler=LETTERS, key=key)
        result = generate(session.model, session.variables, [list(text.encode())], **options)
        text += answer
        assert result.tokens[0] == [*answer.encode()]
    assert session.text == text and session.tokens == list(text.encode())


@pytest.mark.parametrize("counts", [(9, 7), pytest.param((1, 1, 5, 9), marks=pytest.mark.slow)])
def test_an_answer_can_be_continued(counts):
    session, other = new(), new()
    session.append("it goes on")
    other.append("it goes on")
    session.generate(16)
    for count in counts:
        other.generate(count)
    assert other.tokens == session.tokens and other.num_snapshots == 1


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_stop_string_is_no_part_of_the_session(length):
    answer = say(new(), "go", 40)
    # Where the string does not occur before: at any position within pieces and between them.
    starts = [i for i in range(31) if answer.find(answer[i : i + length]) == i]
    for start in starts[::length]:
        session, other = new(), new()
        stop = [answer[start : start + length]]
        assert say(session, "go", 40, stop=stop) == answer[:start]
        assert session.text == "go" + answer[:start] and not session.ended
        other.append("go" + answer[:start])
        if start % 2:
            assert say(session, "!") == say(other, "!")
        else:
            options = dict(sampler=LETTERS, key=jax.random.key(5))
            assert session.generate(12, **options) == other.generate(12, **options)


def test_a_stop_string_within_a_token_leaves_the_text_before_it():
    class Pairs(ByteTokenizer):
        """A letter stands for itself and a comma."""

        def decode(self, ids):
            return "".join(f"{chr(i)}," for i in ids)

    letters = say(new(), "go", 8)
    count = next(i for i in range(1, 8) if letters[i] not in letters[:i])
    session, answer = new(Pairs()), ",".join(letters[:count])
    assert say(session, "go", 8, stop=[f",{letters[count]}"]) == answer
    # The last letter is encoded again, without the comma.
    assert session.tokens == [*b"go", *letters[:count].encode()]


def test_a_stop_token_ends_a_session_until_more_is_appended():
    for tokenizer, stop in ((BYTES, [ord("c")]), (ByteTokenizer(eos_id=ord("c")), [])):
        session = new(tokenizer)
        answer = say(session, "the end", 40, stop=stop)
        assert session.ended and session.tokens == [*b"the end", *answer.strip("c").encode(), 99]
        with pytest.raises(ArgumentError, match="session ended with a stop token .* append text"):
            session.generate()
        num_bytes = session.num_bytes
        session.append("n")
        assert not session.ended
        assert session.num_bytes == num_bytes  # its last token is unread: the state is the same


def test_ids_that_pad_the_vocabulary_have_no_text():
    session = new(ByteTokenizer(vocab_size=ord("c")))
    session.append([*b"XY"])
    answer = session.generate(40, sampler=LETTERS, key=jax.random.key(3))
    assert {*answer} == {*"ab"} and sum(i >= ord("c") for i in session.tokens) == 40 - len(answer)
    assert session.text == "XY" + answer
    session.append([98, 600])
    assert session.text == f"XY{answer}b"


def test_an_answer_that_is_not_taken_to_its_end_is_part_of_the_session():
    session = new()
    session.append("a")
    parts = session.stream(40, sampler=LETTERS, key=jax.random.key(0))
    text = next(parts)
    parts.close()
    assert session.text == "a" + text
    other = new()
    other.append("a" + text)
    assert say(session, "b") == say(other, "b")


def test_the_state_does_not_grow():
    session = new()
    session.append("ab")
    small = session.num_bytes
    session.append("a much longer text " * 40)
    assert session.num_bytes == 2 * small
    for _ in range(20):
        session.append("b")
    assert session.num_snapshots == 8 and session.num_bytes == 9 * small


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A session file and its bytes."""
    session = new()
    say(session, "a text", 3)
    path = tmp_path_factory.mktemp("session") / "a.safetensors"
    session.save(path)
    return path, path.read_bytes()


def load(path):
    return Session.load(path, *model_and_variables(), BYTES)


def test_every_altered_byte_is_detected(file, tmp_path, rng):
    _, data = file
    path = tmp_path / "altered"
    header = 8 + int.from_bytes(data[:8], "little")
    positions = {*range(16), *rng.integers(header, size=250), *rng.integers(len(data), size=250)}
    for position in positions:
        altered = bytearray(data)
        altered[position] ^= int(rng.integers(1, 256))
        path.write_bytes(altered)
        with pytest.raises(ConfigError, match="must be an unaltered session file, but") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_padding_of_the_header_that_is_still_json_is_detected(file, tmp_path):
    _, data = file
    header = 8 + int.from_bytes(data[:8], "little")
    for byte in b"\t\n\r":
        for position in [i for i in range(8, header) if data[i] == ord(" ")][-3:]:
            path = tmp_path / "altered"
            path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
            with pytest.raises(ConfigError, match="the checksum of its header differs"):
                load(path)


def test_a_truncated_or_extended_file_is_refused(file, tmp_path):
    _, data = file
    path = tmp_path / "altered"
    lengths = [*range(0, 20), *range(20, len(data), 997), len(data) - 1]
    for altered in (*(data[:length] for length in lengths), data + b"\0", b"\xff" * 8 + data[8:]):
        path.write_bytes(altered)
        with pytest.raises(ConfigError, match="must be an unaltered session file, but"):
            load(path)


def test_a_file_of_something_else_is_refused(file, tmp_path):
    from safetensors.numpy import save_file

    path, _ = file
    other = tmp_path / "other"
    save_file({"x": np.zeros(2)}, other, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="its header has no checksum; restore it"):
        load(other)
    container.write(other, "model", {}, {"x": np.zeros(2)})
    with pytest.raises(ConfigError, match="must be a session file, got a 'model' file"):
        load(other)
    container.write(other, "session", {}, {"x": np.zeros(2)})
    with pytest.raises(ConfigError, match="session of the config '.*' .*, got 'None'"):
        load(other)
    record, arrays = container.read(path, "session")
    container.write(other, "session", record | {"points": 3}, arrays)
    with pytest.raises(ConfigError, match="its contents are invalid"):
        load(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "FORMAT", 2)
        container.write(other, "session", record, arrays)
    with pytest.raises(ConfigError, match="must have a format up to 1, got 2, .* upgrade"):
        load(other)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


def test_the_header_tells_what_is_in_the_file(file):
    path, data = file
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    record = json.loads(json.loads(text)["__metadata__"]["xlstm_jax"])
    assert record["format"] == 1 and record["kind"] == "session"
    assert record["tokens"][:6] == [*b"a text"]
    assert record["sha256"].keys() == json.loads(text).keys() - {"__metadata__"}
    assert load(path).tokens == record["tokens"]


def test_a_file_with_the_earlier_name_of_max_snapshots_is_read(file, tmp_path):
    record, arrays = container.read(file[0], "session")
    record["max_turns"] = record.pop("max_snapshots")
    container.write(tmp_path / "old", "session", record, arrays)
    assert_same(load(tmp_path / "old"), load(file[0]))


def test_a_session_of_another_model_or_tokenizer_is_refused(file):
    path, _ = file
    with pytest.raises(ConfigError, match="must be a session of the config .* start a new session"):
        Session.load(path, LM(config("s", vocab_size=VOCAB_SIZE)), {}, BYTES)
    with pytest.raises(ConfigError, match="session of the config"):
        other = dataclasses.replace(model_and_variables()[0].cfg, logit_soft_cap=20.0)
        Session.load(path, LM(other), {}, BYTES)
    with pytest.raises(ConfigError, match="must be a session of the tokenizer"):
        Session.load(path, *model_and_variables(), ByteTokenizer(sha256="0" * 64))


def test_a_failed_save_leaves_the_file(file, tmp_path):
    session = new()
    with pytest.raises(FileNotFoundError):
        session.save(tmp_path / "nowhere" / "a")
    with pytest.raises(IsADirectoryError):
        session.save(tmp_path)
    assert [*tmp_path.iterdir()] == []
    session.save(tmp_path / "empty")
    (tmp_path / "other").touch()
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert load(tmp_path / "empty").tokens == []


INVALID = {
    "empty text": (lambda s: s.append(""), "text must have at least one token, got ''"),
    "no ids": (lambda s: s.append([]), "text must be a list of at least one token id"),
    "a number": (lambda s: s.append(3), "text must be a list .* got 3"),
    "unknown id": (lambda s: s.append([700]), "ids from 0 to 609, got 700"),
    "no copies": (lambda s: s.fork(0), "n must be at least 1, got 0"),
    "half a copy": (lambda s: s.fork(1.5), "n must be int, got 1.5"),
    "no snapshots": (lambda s: s.rewind(0), "count must be at least 1, got 0"),
    "too many snapshots": (lambda s: s.rewind(2), "count must be at most 1, .* got 2"),
    "no tokens": (lambda s: s.generate(0), "max_new_tokens must be at least 1, got 0"),
    "empty stop": (lambda s: s.generate(1, stop=[""]), "stop must have no empty string"),
    "text as stop": (lambda s: s.generate(1, stop="ab"), r"got 'ab'; write \['ab'\]"),
    "name of a tokenizer": (lambda s: Session(s.model, s.variables, "byte"), "got 'byte'; load it"),
    "unknown stop": (lambda s: s.generate(1, stop=[None]), "stop must be a list"),
    "no key": (lambda s: s.generate(1, sampler=Sampler()), "key must be a PRNG key"),
    "no snapshots stored": (
        lambda s: new(max_snapshots=0),
        "max_snapshots must be at least 1, got 0",
    ),
    "nothing": (lambda s: new().generate(), "the session is empty and cannot be continued"),
    "vocabulary": (
        lambda s: Session(s.model, s.variables, ByteTokenizer(vocab_size=700)),
        "tokenizer must have at most 610 ids, the vocabulary of the model, got 700",
    ),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_are_refused_and_change_nothing(case):
    session = new()
    session.append("a")
    call, message = INVALID[case]
    before = session.tokens, session._point
    with pytest.raises(ArgumentError, match=message):
        call(session)
    assert (session.tokens, session._point) == before


def test_a_session_that_changes_while_it_answers_is_an_error():
    session = new()
    session.append("a")
    parts = session.stream(40, sampler=LETTERS, key=jax.random.key(0))
    next(parts)
    session.append("b")
    with pytest.raises(ArgumentError, match="the session must not change while an answer"):
        next(parts)


def test_a_stop_string_may_begin_in_a_character_of_the_context():
    """No token of the answer remains; the search for the last one that does must end."""
    *start, end = "\N{EURO SIGN}".encode()
    session = new()
    session.append([*b"a", *start])
    sampler = lambda logits, key, seen: jnp.int32(end)  # noqa: E731
    options = dict(sampler=sampler, key=jax.random.key(0), stop=["\N{EURO SIGN}"])
    assert session.generate(4, **options) == ""
    assert session.tokens == [*b"a", *start]


def test_a_full_disk_is_an_error_of_the_system(monkeypatch, tmp_path):
    def save_file(*args, **kwargs):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", save_file)
    with pytest.raises(OSError) as info:
        new().save(tmp_path / "a.safetensors")
    assert info.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
