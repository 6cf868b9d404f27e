"""Chat templates: conversations to tokens, with a mask of the assistant's messages."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from xlstm_jax.data import sandbox
from xlstm_jax.data.tokenizers import TOKENIZERS, Tokenizer, files, locate
from xlstm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from xlstm_jax.errors import ConfigError, quote, quote_path

ROLES = ("system", "developer", "user", "assistant", "tool")
_TAG = re.compile(r"\{%[-+]?\s*generation\b")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Rendering(NamedTuple):
    """A formatted conversation, and the characters (start, stop) of the assistant's messages."""

    text: str
    answers: list[tuple[int, int]]
    tagged: bool  # whether the template marks the answers; then their ends may be left out


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as `transformers` uses it; it runs in a sandbox, with limits."""

    path: Path  # of its file, for messages
    source: str
    variables: Mapping[str, str]  # special tokens, such as "bos_token"

    def encode(
        self, tokenizer: Tokenizer, messages: Any, name: str
    ) -> tuple[Integer[np.ndarray, "T"], Bool[np.ndarray, "T"], int]:
        """The tokens of a conversation, whether each is a target, and the bytes of text.

        Targets are the assistant's messages, each with the special token that ends it. The ids are
        those of the formatted conversation, which ends with `tokenizer.eos_id`; it is appended,
        as a target if it directly follows one, unless the template writes it.

        Args:
            messages: a list of messages, each with a role of `ROLES` and a content.
            name: file and record, for error messages.

        Raises:
            ConfigError: a message is invalid, or the template fails on the conversation.
        """
        try:
            _check(messages)
            rendering = self.render(messages)
            ids, mask = _tokens(tokenizer, rendering)
        except ConfigError as error:
            raise ConfigError(f"{quote_path(name)}: {error}") from error
        if not len(ids) or ids[-1] != tokenizer.eos_id:
            ids = np.append(ids, ids.dtype.type(tokenizer.eos_id))
            mask = np.append(mask, mask[-1:] if len(mask) else False)
        return ids, mask, tokenizer.num_bytes(ids)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendering:
        """Formats a conversation.

        The `{% generation %}` tags of the template mark the assistant's messages. Without them, an
        answer is what the rendering up to its message adds to the rendering up to the message
        before, with the prompt for an answer.

        Raises:
            ConfigError: the template fails, is over a limit, or changes earlier messages.
        """
        text, answers = self._render(messages)
        if _TAG.search(self.source):
            return Rendering(text, answers, tagged=True)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._render(messages[:i], add_generation_prompt=True)
                after, _ = self._render(messages[: i + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise ConfigError(
                        f"the chat template {quote_path(self.path)} formats message {i + 1} "
                        "differently when others follow, or not after its own prompt, so that the "
                        "answer cannot be located; enclose answers in {% generation %} and "
                        "{% endgeneration %}."
                    )
                answers.append((len(before), len(after)))
        return Rendering(text, answers, tagged=False)

    def text(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """A formatted conversation; raises ConfigError if the template fails or is over a limit.

        Args:
            add_generation_prompt: end it with the prompt for an answer.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def _render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        values = {
            **dict.fromkeys(_SPECIAL_TOKENS, ""),
            **self.variables,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return sandbox.render(self.path, self.source, values)


def load(name_or_path: str) -> ChatTemplate:
    """The chat template of a tokenizer, from chat_template.jinja or tokenizer_config.json.

    Args:
        name_or_path: as for `tokenizers.get`.

    Raises:
        ConfigError: it does not exist, or is invalid.
    """
    if name_or_path in TOKENIZERS:
        raise ConfigError(
            f"tokenizer={quote(name_or_path)} has no chat template; use the folder of a tokenizer "
            f"with {files.TEMPLATE}."
        )
    contents = files.read_files(locate.find(name_or_path))
    folder = contents.path.parent
    if contents.template is not None:
        path, source = folder / files.TEMPLATE, contents.template
    else:
        path = folder / files.CONFIG
        source = _default(contents.settings.get("chat_template"), path)
    tokens = {
        key: token
        for key in _SPECIAL_TOKENS
        if (token := files.special_token(contents.settings, key, contents.path))
    }
    template = ChatTemplate(path, source, tokens)
    sandbox.check(path, source)
    return template


def _default(value: Any, path: Path) -> str:
    """The template of a tokenizer_config.json: one, or the default one of a list."""
    if isinstance(value, list):
        named = {item.get("name"): item for item in value if isinstance(item, dict)}
        value = named.get("default", {}).get("template")
    if not isinstance(value, str):
        raise ConfigError(
            f"{quote_path(path)} must have a chat_template, got {quote(value)}; write the template "
            f"to {files.TEMPLATE} beside it."
        )
    return value


def _check(messages: Any) -> None:
    """Raises ConfigError, with the number of the message, for an invalid conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ConfigError(
            f"messages must be a list of at least one message, got {quote(messages)}; remove the "
            "record."
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise ConfigError(
                f"message {number} must have a role of {', '.join(ROLES)}, got {quote(role)}; "
                "rename it."
            )
        content = message.get("content")
        if not (isinstance(content, (str, list)) or message.get("tool_calls")):
            raise ConfigError(
                f"message {number} must have a content, a text, got {quote(content)}; add it, or "
                "remove the record."
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(
            "messages must have one of the assistant, to learn from; remove the record."
        )
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # surrogates among others
        raise ConfigError(
            f"messages must be JSON, and text UTF-8 ({error}); correct them."
        ) from error


def _tokens(
    tokenizer: Tokenizer, rendering: Rendering
) -> tuple[Integer[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """The ids of a text, and whether each is a target."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids, offsets = tokenizer.encode_offsets(rendering.text)
        ranges = [_overlapping(offsets, answer) for answer in rendering.answers]
    else:
        ids, ranges = _encode_segments(tokenizer, rendering)
    mask = np.zeros(len(ids), np.bool_)
    for start, stop in ranges:
        stop = _end_of_answer(tokenizer, ids, start, stop, tagged=rendering.tagged)
        mask[start:stop] = True
    return ids, mask


def _overlapping(offsets: Integer[np.ndarray, "T 2"], chars: tuple[int, int]) -> tuple[int, int]:
    """The tokens (start, stop) that encode a range of characters."""
    first, last = np.maximum(offsets[:, 0], chars[0]), np.minimum(offsets[:, 1], chars[1])
    tokens = np.flatnonzero(first < last)
    return (int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0)


def _encode_segments(
    tokenizer: Tokenizer, rendering: Rendering
) -> tuple[Integer[np.ndarray, "T"], list[tuple[int, int]]]:
    """Encodes each answer and each text between them separately: for a tokenizer without offsets.

    Special tokens in the text become their ids.
    """
    bounds = sorted({0, len(rendering.text), *(i for answer in rendering.answers for i in answer)})
    positions, parts, length = {0: 0}, [tokenizer.encode("")], 0
    for start, stop in zip(bounds, bounds[1:], strict=False):
        parts.append(encode_special(tokenizer, rendering.text[start:stop]))
        length += len(parts[-1])
        positions[stop] = length
    return np.concatenate(parts), [(positions[a], positions[b]) for a, b in rendering.answers]


def encode_special(tokenizer: Tokenizer, text: str) -> Integer[np.ndarray, "T"]:
    """The ids of a formatted text, in which special tokens become their ids."""
    special: Mapping[str, int] = getattr(tokenizer, "special_ids", {})
    if not special:
        return tokenizer.encode(text)
    longest_first = sorted(special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    empty = tokenizer.encode("")
    ids = [
        np.array([special[piece]], empty.dtype) if piece in special else tokenizer.encode(piece)
        for piece in pieces
        if piece
    ]
    return np.concatenate([empty, *ids])


def _end_of_answer(
    tokenizer: Tokenizer,
    ids: Integer[np.ndarray, "T"],
    start: int,
    stop: int,
    *,
    tagged: bool,
) -> int:
    """The end of the targets of an answer: after its last special token, if one ends it.

    White space after that token belongs to the template: generation stops before it. Tags may
    enclose only the text; then the special token after it is a target, or a model would not stop.
    """
    special = tokenizer.token_bytes[ids[start : stop + 1]] == 0
    ends = np.flatnonzero(special[: stop - start])
    if len(ends):
        last = start + int(ends[-1]) + 1
        return last if not tokenizer.decode(ids[last:stop]).strip() else stop
    if tagged and stop > start:
        return stop + int(special[stop - start :].any())
    return stop
