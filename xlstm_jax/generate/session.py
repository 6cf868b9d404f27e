"""Sessions: a text that a user and a model write alternately, with the state of the model after it.

The state has a fixed size, so a session can be copied, rewound and stored at the same small cost
after any number of tokens.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import MAX_INT, as_type, check_range, user_path
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import decode, session_file
from xlstm_jax.generate.arguments import AnyKey, check_tokenizer, token_ids
from xlstm_jax.generate.prefix_cache import PrefixCache, state_after, state_bytes
from xlstm_jax.generate.prepare import is_prepared, prepare_params
from xlstm_jax.generate.sampling import greedy
from xlstm_jax.generate.session_file import Point
from xlstm_jax.generate.text import CONTEXT, PIECE, check_stop, text_parts
from xlstm_jax.modules.lm import LM


class Session:
    """A text and the state of the model after it.

    Args:
        variables: of the model, or what `prepare_params` returned, which several sessions of one
            model should share: every session prepares others for itself.
        tokenizer: of the model; its ids must be in the vocabulary of the model.
        cache: of the states after common beginnings of sessions.
        max_snapshots: states that are stored for `rewind`, one before each `append`.

    Raises:
        ArgumentError: an argument is invalid.
    """

    def __init__(
        self,
        model: LM,
        variables: Any,
        tokenizer: Tokenizer,
        *,
        cache: PrefixCache | None = None,
        max_snapshots: int = 8,
    ):
        check_tokenizer(tokenizer, model.cfg.vocab_size)
        self.model, self.tokenizer = model, tokenizer
        self._owner = variables  # the key of the cache
        self.variables = variables if is_prepared(variables) else prepare_params(model, variables)
        self.cache = cache
        self.max_snapshots: int = as_type(int, max_snapshots, "max_snapshots")
        check_range("max_snapshots", self.max_snapshots, "at least 1")
        self._tokens: list[int] = []
        self._snapshots: list[Point] = []  # before each of the newest calls of `append`
        self._point = Point()

    @property
    def tokens(self) -> list[int]:
        """All tokens, appended and generated, stop tokens included."""
        return list(self._tokens)

    @property
    def text(self) -> str:
        """The text of all tokens; special ones have none."""
        return self.tokenizer.decode(self._known(self._tokens))

    @property
    def ended(self) -> bool:
        """Whether the last answer ended with a stop token, so that more has to be appended."""
        return self._point.ended

    @property
    def num_snapshots(self) -> int:
        """Calls of `append` that can be rewound."""
        return len(self._snapshots)

    @property
    def num_bytes(self) -> int:
        """Bytes of the states of the session; copies share theirs."""
        states = session_file.distinct_states([*self._snapshots, self._point])
        return sum(map(state_bytes, states))

    def append(self, text: str | Sequence[int]) -> None:
        """Appends a text, or token ids, and reads it.

        Raises:
            ArgumentError: the text is empty, or an id is not in the vocabulary.
        """
        ids = self.tokenizer.encode(text) if isinstance(text, str) else text
        if isinstance(text, str) and len(ids) == 0:
            raise ArgumentError("text must have at least one token, got ''; pass some text.")
        added = token_ids(ids, "text", self.model.cfg.vocab_size).tolist()
        before, tokens = self._point, [*self._tokens, *added]
        # The last token is left for the logits. Reading now, not when generating, lets copies share
        # the state after the text.
        state, unread = before.state, np.array(tokens[before.num_read : -1], np.int32)
        model = self.model, self.variables
        if len(unread):
            if self.cache is not None and state is None:
                state, unread = self.cache.read(self._owner, *model, unread)
            state = state_after(*model, unread, state)
        self._snapshots = [*self._snapshots, before][-self.max_snapshots :]
        self._tokens = tokens
        self._point = Point(len(tokens), len(tokens) - 1, state)

    def generate(
        self,
        max_new_tokens: int = 64,
        *,
        sampler: decode.SamplerFn = greedy,
        key: AnyKey | None = None,
        stop: Sequence[str | int] = (),
    ) -> str:
        """Continues the session and returns the new text; see `stream`."""
        options: dict[str, Any] = dict(sampler=sampler, key=key, stop=stop)
        return "".join(self.stream(max_new_tokens, **options))

    def stream(
        self,
        max_new_tokens: int = 64,
        *,
        sampler: decode.SamplerFn = greedy,
        key: AnyKey | None = None,
        stop: Sequence[str | int] = (),
    ) -> Iterator[str]:
        """Continues the session and yields the new text in parts.

        The session has all tokens that were generated, also if the caller does not take every part.

        Args:
            max_new_tokens: limit, a stop token included; at least 1.
            sampler, key: as in `generate`; a repetition penalty counts the tokens of this answer
                and the few before it that are unread.
            stop: strings, which end the text and are not part of it, and token ids, which are part
                of the session. The end of a document is always one.

        Raises:
            ArgumentError: an argument is invalid, or the session cannot be continued; before the
                first `next`.
        """
        max_new_tokens = as_type(int, max_new_tokens, "max_new_tokens")
        check_range(
            "max_new_tokens", max_new_tokens, "at least 1", "append reads text without an answer"
        )
        if not self._tokens or self.ended:
            reason = "ended with a stop token" if self._tokens else "is empty"
            raise ArgumentError(f"the session {reason} and cannot be continued; append text first.")
        strings = [item for item in stop if isinstance(item, str)]
        check_stop(stop if isinstance(stop, str) else strings)
        ids = [self.tokenizer.eos_id, *(item for item in stop if not isinstance(item, str))]
        stop_ids = token_ids(ids, "stop", MAX_INT).tolist()
        return _Answer(self, stop_ids, strings).stream(max_new_tokens, sampler, key)

    def fork(self, n: int) -> list["Session"]:
        """n independent copies, which share the states: they take no memory of their own.

        Raises:
            ConfigError: n is below 1.
        """
        check_range("n", as_type(int, n, "n"), "at least 1", "it counts the copies")
        return [self._copy() for _ in range(n)]

    def _copy(self) -> "Session":
        options: dict[str, Any] = dict(cache=self.cache, max_snapshots=self.max_snapshots)
        copy = Session(self.model, self.variables, self.tokenizer, **options)
        copy._owner = self._owner
        copy._tokens, copy._snapshots = list(self._tokens), list(self._snapshots)
        copy._point = self._point
        return copy

    def rewind(self, count: int = 1) -> None:
        """Undoes the newest calls of `append` and their answers.

        Raises:
            ConfigError, ArgumentError: `count` is below 1, or above `num_snapshots`.
        """
        check_range("count", as_type(int, count, "count"), "at least 1", "1 undoes the last append")
        if count > len(self._snapshots):
            raise ArgumentError(
                f"count must be at most {self.num_snapshots}, the snapshots of this session, got "
                f"{count}; it stores the newest max_snapshots={self.max_snapshots}."
            )
        self._point = self._snapshots[-count]
        del self._snapshots[-count:], self._tokens[self._point.length :]

    def save(self, path: str | Path) -> None:
        """Writes the tokens and states to one safetensors file.

        Raises:
            OSError, ConfigError: the file cannot be written, or safetensors is not installed.
        """
        points = [*self._snapshots, self._point]
        contents = session_file.Contents(self._tokens, points, self.max_snapshots)
        session_file.write(user_path(path), self.model, self.tokenizer, contents)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: LM,
        variables: Any,
        tokenizer: Tokenizer,
        *,
        cache: PrefixCache | None = None,
    ) -> "Session":
        """Reads a session that `save` wrote; it continues as if it had never been stored.

        Raises:
            OSError: the file cannot be opened.
            ConfigError: the file is altered or truncated, or of another config or tokenizer.
        """
        contents = session_file.read(user_path(path), model, tokenizer)
        session = cls(
            model, variables, tokenizer, cache=cache, max_snapshots=contents.max_snapshots
        )
        session._tokens, (*session._snapshots, session._point) = contents.tokens, contents.points
        return session

    def _known(self, tokens: Iterable[int]) -> list[int]:
        """Tokens that have a text: others only pad the vocabulary of the model."""
        return [token for token in tokens if token < self.tokenizer.vocab_size]


class _Answer:
    """One call of `Session.stream`, which moves the session forward with every piece."""

    def __init__(self, session: Session, stop_ids: list[int], strings: list[str]):
        self.session, self.stop_ids, self.strings = session, stop_ids, strings
        self.first = session._point  # before the call
        self.context = session._known(session._tokens[-CONTEXT:])

    def stream(self, max_new_tokens: int, sampler: Any, key: Any) -> Iterator[str]:
        """Checks the arguments; the parts of the text follow on demand."""
        session, first = self.session, self.first
        # At least two pieces, so that the state before the last one has read the others; and few
        # powers of two, each of which is a program.
        piece = min(PIECE, max_new_tokens - 1) if max_new_tokens > PIECE // 2 + 1 else 1
        pieces = decode.stream(
            session.model,
            session.variables,
            [session._tokens[first.num_read :]],
            max_new_tokens=max_new_tokens,
            piece=piece,
            sampler=sampler,
            key=key,
            state=first.state,
            stop=self.stop_ids,
        )
        # Enough states to return to one before the longest stop string.
        longest = max((len(string.encode()) for string in self.strings), default=0)
        self.recent = collections.deque([first], maxlen=3 + longest // piece)
        recorded = self._recorded(pieces)
        return self._text(text_parts(recorded, session.tokenizer, self.strings, self.context))

    def _recorded(self, pieces: Iterator[decode.Generation]) -> Iterator[decode.Generation]:
        session, point = self.session, self.first
        for piece in pieces:
            if session._point is not point:
                raise ArgumentError(
                    "the session must not change while an answer is generated; use a copy from "
                    "fork(1)."
                )
            session._tokens += piece.tokens[0]
            length = len(session._tokens)
            ended = session._tokens[-1] in self.stop_ids
            after = Point(length, length, piece.state, ended)
            point = after if ended else self.recent[-1]._replace(length=length)
            session._point = point
            self.recent.append(after)
            yield piece

    def _text(self, parts: Iterator[str]) -> Iterator[str]:
        answer = ""
        for part in parts:
            answer += part
            yield part
        if self.strings:
            self._truncate(answer)

    def _truncate(self, answer: str) -> None:
        """Makes the session end with the answer, of which a stop string has been removed."""
        session, first = self.session, self.first
        generated = session._tokens[first.length :]
        start = len(session.tokenizer.decode(self.context).rstrip("\N{REPLACEMENT CHARACTER}"))

        def text(count: int) -> str:
            return session.tokenizer.decode(self.context + session._known(generated[:count]))[
                start:
            ]

        count = len(generated)
        if text(count) == answer:
            return
        while count and not answer.startswith(text(count)):
            count -= 1
        # A token may have the end of the answer and the beginning of the stop string. Without
        # any token, the text is only what the context leaves incomplete.
        rest = answer[len(text(count)) :] if count else answer
        length = first.length + count
        session._tokens[length:] = session.tokenizer.encode(rest).tolist() if rest else []
        point = next((p for p in reversed(self.recent) if p.num_read < length), first)
        session._point = point._replace(length=len(session._tokens), ended=False)
