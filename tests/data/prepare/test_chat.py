"""Conversations: targets of the loss, and errors with the line."""

import json

import numpy as np
import pytest

from tests.data.prepare.runs import run
from xlstm_jax.config import ConfigError
from xlstm_jax.data import sandbox
from xlstm_jax.data.shards.open import open_tokens
from xlstm_jax.data.tokenizers import get
from xlstm_jax.data.train_tokenizer import train_bpe

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer and a chat template."""
    train_bpe([b"user assistant question answer " * 20], 300, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "tokenizer")


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, conversations):
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    )


def test_the_answers_of_the_assistant_are_the_targets(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [conversation(f"q {i}?", f"a {i}!") for i in range(3)])
    out = tmp_path / "out"
    run(tmp_path / "a.jsonl", out, tokenizer=tokenizer, chat=True, split="train")
    opened = open_tokens(str(out), "train", block_len=256, max_blocks=1)
    store = opened.store
    ids, mask = store.read(0, store.num_tokens), store.loss_mask(0, store.num_tokens)
    assert store.num_documents == 3 and (ids == get(tokenizer).eos_id).sum() == 3
    decode = get(str(out / "tokenizer")).decode
    assert decode(ids[mask]) == "a 0!a 1!a 2!"
    assert decode(ids) == "".join(f"<user>q {i}?<assistant>a {i}!" for i in range(3))
    assert np.fromfile(out / "train/00000.loss", np.uint8).tolist() == mask.tolist()
    assert (out / "tokenizer/chat_template.jinja").read_text() == TEMPLATE


def test_another_template_than_before_is_refused(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [conversation("q", "a")])
    options = {"tokenizer": tokenizer, "chat": True, "split": "train"}
    run(tmp_path / "a.jsonl", tmp_path / "out", **options)
    (tmp_path / "tokenizer/chat_template.jinja").write_text(TEMPLATE + ".")
    with pytest.raises(ConfigError, match="template_sha256 was"):
        run(tmp_path / "a.jsonl", tmp_path / "out", **options)


@pytest.mark.parametrize(
    "messages", [[{"role": "wizard", "content": "x"}], [{"role": "user"}], "text", [1]]
)
def test_an_invalid_conversation_is_an_error_with_its_line(tmp_path, tokenizer, messages):
    write(tmp_path / "a.jsonl", [conversation("q", "a")] * 2 + [messages])
    with pytest.raises(ConfigError, match=r"a\.jsonl(:3|, line 3)"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer, chat=True, split="train")
    assert not list((tmp_path / "out").rglob("0000*"))


def test_text_files_are_no_conversations(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="messages"):
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer, chat=True, split="train")


def test_a_tokenizer_without_a_template_is_refused_before_anything_is_written(tmp_path):
    write(tmp_path / "a.jsonl", [conversation("q", "a")])
    with pytest.raises(ConfigError, match="no chat template"):
        run(tmp_path / "a.jsonl", tmp_path / "out", chat=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_template_that_loops_forever_is_stopped(tmp_path, tokenizer, monkeypatch, num_workers):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)  # of this process only
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (tmp_path / "tokenizer/chat_template.jinja").write_text(loops)
    write(tmp_path / "a.jsonl", [conversation("q", "a")])
    with pytest.raises(ConfigError, match=r"a\.jsonl:1.*takes over"):
        options = {"tokenizer": tokenizer, "chat": True, "num_workers": num_workers}
        run(tmp_path / "a.jsonl", tmp_path / "out", **options)
