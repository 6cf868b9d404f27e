"""Sessions and chats of `xlstm-jax generate`: --session FILE and --chat."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.cli import console
from xlstm_jax.config import ConfigError
from xlstm_jax.data import chat
from xlstm_jax.errors import quote_path
from xlstm_jax.generate import Session
from xlstm_jax.generate.chat import Chat


def check(path: Path | None, prompt: str | None, *, is_chat: bool) -> None:
    """Raises ConfigError unless a session can be saved at a path and has a text to continue."""
    exists = path is not None and path.exists()
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ConfigError(
            f"--session must be a file in an existing folder, got {quote_path(path)}; create the "
            "folder, make it writable or choose another."
        )
    if prompt is None and not (exists or is_chat):
        raise ConfigError(
            "`xlstm-jax generate` needs --prompt STR, the text to continue; see `xlstm-jax "
            "generate --help`."
        )


def load_or_start(path: Path | None, *model: Any) -> Session:
    """The session in a file, or a new one; `model` are the arguments of `Session`."""
    return Session.load(path, *model) if path is not None and path.exists() else Session(*model)


def continue_text(
    session: Session, path: Path, prompt: str | None, seed: jax.Array, **options: Any
) -> None:
    """Appends the prompt, if any, prints it with its continuation, and saves the session."""
    if prompt is not None:
        session.append(prompt)
    parts = session.stream(key=_key(seed, session), **options)
    console.write(prompt or "")
    _print_and_save(parts, session, path)


def talk(
    session: Session,
    path: Path | None,
    tokenizer: str,
    message: str | None,
    seed: jax.Array,
    **options: Any,
) -> None:
    """Answers the first message, if any, and every line of the standard input.

    Args:
        tokenizer: name or path, whose chat template is used.
    """
    conversation = Chat(session, chat.load(tokenizer))
    for line in _lines(message):
        parts = conversation.send(line, key=_key(seed, session), **options)
        _print_and_save(parts, session, path)


def _lines(first: str | None) -> Iterator[str]:
    """The first message and the lines of the standard input that are not blank."""
    if first is not None:
        yield first
    while True:
        if sys.stdin.isatty():
            console.write("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _print_and_save(parts: Iterator[str], session: Session, path: Path | None) -> None:
    try:
        for part in parts:
            console.write(part)
    except KeyboardInterrupt:  # ends the answer; the session has what was generated
        if path is None:
            raise
    console.write("\n")
    if path is not None:
        session.save(path)


def _key(seed: jax.Array, session: Session) -> jax.Array:
    """A key for the next answer, so that answers differ and a stored session can be repeated."""
    return jax.random.fold_in(seed, len(session.tokens))
