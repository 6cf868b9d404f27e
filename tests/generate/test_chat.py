"""Chats: the tokens of a session are those of the formatted conversation."""

import io
import json
from pathlib import Path

import jax
import pytest

from tests.data import tokenizer_files
from tests.generate.conversations import BYTES, LETTERS, VOCAB_SIZE, model_and_variables
from xlstm_jax import cpu
from xlstm_jax.cli import main
from xlstm_jax.data import DataConfig, tokenizers
from xlstm_jax.data import chat as templates
from xlstm_jax.data.chat import ChatTemplate
from xlstm_jax.errors import ArgumentError, ConfigError
from xlstm_jax.generate import Sampler, Session, container, prefill
from xlstm_jax.generate.chat import Chat
from xlstm_jax.train import ExperimentConfig, TrainConfig, models

pytest.importorskip("jinja2")

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QUESTIONS = ["what is it?", "  why?  ", "no"]


@pytest.fixture(scope="module", autouse=True)
def single_prefill_width():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WIDTHS", (16,))
        yield


def template(source):
    return ChatTemplate(Path("t.jinja"), source, {})


def ask(chat, question, count=9, sampler=LETTERS, seed=7):
    return "".join(
        chat.send(question, max_new_tokens=count, sampler=sampler, key=jax.random.key(seed))
    )


def conversation(source, answers):
    """The rendering of all messages, up to the end of the last answer."""
    pairs = zip(QUESTIONS, answers, strict=True)
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    text = template(source).text(messages[:-1], add_generation_prompt=True)
    return text + answers[-1]


def test_messages_without_special_tokens_have_the_text_of_the_template():
    session = Session(*model_and_variables(), BYTES)
    chat = Chat(session, template(PLAIN))
    answers = [ask(chat, question) for question in QUESTIONS]
    assert session.text == conversation(PLAIN, answers)
    assert session.num_snapshots == 3
    session.rewind()
    assert ask(chat, QUESTIONS[-1]) == answers[-1]


def test_the_text_before_the_next_message_ends_an_answer():
    session = Session(*model_and_variables(), BYTES)
    chat = Chat(session, template(PLAIN.replace("\n", "b ")))
    answers = [ask(chat, question, 80) for question in QUESTIONS]
    assert chat._stop == ["b user:"]
    chat._stop = ["bc"]  # these models write letters only
    answers.append(ask(chat, "more", 80))
    assert "bc" not in answers[-1] and session.text.endswith(answers[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with the special tokens of a template."""
    pytest.importorskip("tokenizers")
    values = json.loads(tokenizer_files.byte_level_bpe())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"] += [
        {"id": 600 + i, "content": content, "special": True, **flags}
        for i, content in enumerate(["<|start|>", "<|end|>"])
    ]
    path = tmp_path_factory.mktemp("chat")
    tokenizer_files.write_folder(path, json.dumps(values).encode(), chat_template=SPECIAL)
    return path


def test_messages_with_special_tokens_have_the_tokens_of_the_template(folder):
    tokenizer = tokenizers.get(str(folder))
    session = Session(*model_and_variables(), tokenizer)
    chat = Chat(session, templates.load(str(folder)))
    letters = [tokenizer.encode(letter)[0] for letter in "abc"]
    never = tuple(i for i in range(VOCAB_SIZE) if i not in [*letters, 601])
    answers = []
    for question, count, seed in zip(QUESTIONS, (40, 1, 1), (7, 0, 0), strict=True):
        answers.append(ask(chat, question, count, Sampler(never=never, temperature=10.0), seed))
        # The model ends an answer itself, or the limit does and the next message adds the end.
        assert session.ended == (count == 40)
    text = tokenizer.inner.decode(session.tokens, skip_special_tokens=False)
    assert text == conversation(SPECIAL, answers)
    assert session.tokens.count(601) == 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}" + PLAIN,
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
    ],
)
def test_a_template_that_changes_earlier_messages_is_refused(source):
    session = Session(*model_and_variables(), BYTES)
    with pytest.raises(ConfigError, match="t.jinja must append every message to the text before"):
        Chat(session, template(source))


def test_an_empty_message_is_refused():
    chat = Chat(Session(*model_and_variables(), BYTES), template(PLAIN))
    with pytest.raises(ArgumentError, match="message must have some text, got none"):
        chat.send(" \n")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, folder):
    """Makes calls of `generate` with a small model: its output, or its one-line error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    model, variables = model_and_variables()
    cfg = ExperimentConfig(name="x", model=model.cfg, data=DataConfig(), train=TrainConfig())
    loaded = models.Model(cfg, variables["params"], str(folder), is_run=True)
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main(["generate", "x", "--max-new-tokens", "9", "--temperature", "0", *arguments])
        out, err = capsys.readouterr()
        assert code == 0 and not err or code == 2 and not out and err.count("\n") == 1
        return out if code == 0 else err

    return run


def test_a_session_file_continues_a_text(call, tmp_path):
    options = ["--session", "a.safetensors"]
    first = call(*options, "--prompt", "It was")
    assert first.startswith("It was") and [p.name for p in tmp_path.iterdir()] == [options[1]]
    data = (tmp_path / options[1]).read_bytes()
    second = call(*options, "--prompt", " and")
    assert second.startswith(" and") and second != first
    third = call(*options)
    (tmp_path / options[1]).write_bytes(data)
    assert call(*options, "--prompt", " and") == second
    assert call(*options) == third


def test_a_chat_answers_every_line_and_goes_on_from_its_file(call, tmp_path, folder):
    options = ["--chat", "--session", "a"]
    answers = call(*options, stdin="one\n\ntwo\nthree\n")
    parts = call("--chat", "--session", "b", "--prompt", "one")
    parts += call("--chat", "--session", "b", stdin="two\n")
    parts += call("--chat", "--session", "b", stdin="three")
    assert parts == answers
    (a, arrays), (b, others) = (container.read(tmp_path / name, "session") for name in "ab")
    assert a == b and arrays.keys() == others.keys()
    assert call("--chat") == ""


ERRORS = {
    "": "`xlstm-jax generate` needs --prompt STR, the text to continue",
    "--session new": "needs --prompt",
    "--session nowhere/a --prompt x": "--session must be a file in an existing folder, got",
    "--session . --prompt x": "--session must be a file in an existing folder, got .",
    "--session text --prompt x": "text must be an unaltered session file, but its header has no",
    "--chat --session text": "text must be an unaltered session file, but its header has no",
}


@pytest.mark.parametrize("line", ERRORS)
def test_invalid_options_give_one_line(call, tmp_path, line):
    (tmp_path / "text").write_text("no session")
    assert ERRORS[line] in call(*line.split())


def test_a_tokenizer_without_a_template_cannot_chat(call, monkeypatch):
    loaded = models.load()._replace(tokenizer="byte")
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)
    assert "tokenizer='byte' has no chat template; use the folder" in call("--chat")
