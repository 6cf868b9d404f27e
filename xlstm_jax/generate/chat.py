"""Chats: sessions whose messages have the format of a chat template.

The state has read the earlier messages and cannot change them, so the text of a new message is what
the template adds for it. It is taken from a conversation of placeholders: the template must format
a message in the same way whatever precedes it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xlstm_jax.data.chat import ChatTemplate, encode_special
from xlstm_jax.errors import ArgumentError, ConfigError, quote_path
from xlstm_jax.generate.session import Session

# Texts that no template contains.
_QUESTION, _ANSWER, _NEXT = "placeholder-question", "placeholder-answer", "placeholder-next"


class Chat:
    """A session in which a user sends messages and the model answers.

    Args:
        session: empty, or of an earlier chat with the same template.

    Raises:
        ConfigError: the template cannot be used: it fails, or it changes earlier messages.
    """

    def __init__(self, session: Session, template: ChatTemplate):
        self.session, self._template = session, template
        question = [{"role": "user", "content": _QUESTION}]
        self._answered = [*question, {"role": "assistant", "content": _ANSWER}]
        prompt = template.text(question, add_generation_prompt=True)
        self._before = template.text(self._answered)
        tail = self._added(prompt, self._before).partition(_ANSWER)
        if not tail[1]:
            raise self._unusable("it leaves out an answer")
        self._tail = tail[2]
        tokenizer = session.tokenizer
        tail_ids = encode_special(tokenizer, self._tail)
        special = np.flatnonzero(tokenizer.token_bytes[tail_ids] == 0)
        # Up to the special token that ends an answer; the model generates it.
        self._end_ids = tail_ids[: special[0] + 1].tolist() if len(special) else []
        self._stop: list[str | int] = self._end_ids[-1:]
        if not self._stop:
            # Without one, the text between an answer and the next message ends the answer.
            between = self._next_text(_NEXT).partition(_NEXT)[0].rstrip()
            self._stop = [between] if between else []

    def send(
        self, message: str, *, stop: Sequence[str | int] = (), **options: Any
    ) -> Iterator[str]:
        """Appends a message and yields the answer in parts.

        Args:
            stop, options: those of `Session.stream`; the end of an answer is always a stop token.

        Raises:
            ArgumentError: the message is empty, or as `Session.stream`.
            ConfigError: the template fails.
        """
        if not message.strip():
            raise ArgumentError("message must have some text, got none; write a message.")
        session = self.session
        if session.tokens:
            text = self._next_text(message)
        else:
            text = self._template.text(
                [{"role": "user", "content": message}], add_generation_prompt=True
            )
        ids = encode_special(session.tokenizer, text).tolist()
        end = self._end_ids
        if session.ended and session.tokens[-1:] == end[-1:] and ids[: len(end)] == end:
            ids = ids[len(end) :]  # the model wrote the end of its answer itself
        session.append(ids)
        return session.stream(stop=[*self._stop, *stop], **options)

    def _next_text(self, message: str) -> str:
        """The text after an answer: its end, the message, and the prompt for the next answer."""
        messages = [*self._answered, {"role": "user", "content": message}]
        longer = self._template.text(messages, add_generation_prompt=True)
        return self._tail + self._added(self._before, longer)

    def _added(self, before: str, after: str) -> str:
        if not after.startswith(before):
            raise self._unusable("it formats earlier messages differently when others follow")
        return after[len(before) :]

    def _unusable(self, reason: str) -> ConfigError:
        return ConfigError(
            f"the chat template {quote_path(self._template.path)} must append every message to the "
            f"text before, but {reason}; use another template."
        )
