"""The file of a session: tokens and states as safetensors, see `container`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.config import fingerprint
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, ConfigError, quote, quote_path
from xlstm_jax.generate import container
from xlstm_jax.generate.arguments import token_ids
from xlstm_jax.modules.lm import LM
from xlstm_jax.modules.stack import check_stack_state
from xlstm_jax.sharding.axes import path_name

KIND = "session"


class Point(NamedTuple):
    """A state from which a session can continue.

    At least one token is unread, unless the session is empty or has ended: the model is called with
    it to get the logits of the next one.
    """

    length: int = 0  # tokens of the session
    num_read: int = 0  # of these, tokens that the state has read
    state: Any = None  # None: the initial state
    ended: bool = False  # the last token is a stop token


class Contents(NamedTuple):
    """The contents of a session without its model and tokenizer."""

    tokens: list[int]
    points: list[Point]  # the snapshots, and the present one
    max_snapshots: int


def distinct_states(points: Sequence[Point]) -> list[Any]:
    """The states of all points, each once; None is left out."""
    return list({id(p.state): p.state for p in points if p.state is not None}.values())


def write(path: Path, model: LM, tokenizer: Tokenizer, contents: Contents) -> None:
    """Writes a session; raises OSError or ConfigError if it cannot."""
    states = distinct_states(contents.points)
    numbers = {id(state): number for number, state in enumerate(states)}
    record = {
        "config": fingerprint(model.cfg),
        "tokenizer": tokenizer.sha256,
        "tokens": contents.tokens,
        "points": [p._replace(state=numbers.get(id(p.state)))._asdict() for p in contents.points],
        "max_snapshots": contents.max_snapshots,
    }
    arrays = {
        f"{number}/{name}": np.asarray(leaf)
        for number, state in enumerate(states)
        for name, leaf in _named(state).items()
    }
    container.write(path, KIND, record, arrays)


def read(path: Path, model: LM, tokenizer: Tokenizer) -> Contents:
    """Reads a session.

    Raises:
        OSError: the file cannot be opened.
        ConfigError: the file is altered or truncated, or of another config or tokenizer.
    """
    record, arrays = container.read(path, KIND)
    _check_same(path, "config", record, fingerprint(model.cfg))
    _check_same(path, "tokenizer", record, tokenizer.sha256)
    try:
        return _contents(model, record, arrays)
    except (ArgumentError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{quote_path(path)} must be a session of this model, but its contents are invalid "
            f"({quote(str(error))}); start a new session."
        ) from error


def _contents(model: LM, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Contents:
    points = [Point(**point) for point in record["points"]]
    numbers = dict.fromkeys(point.state for point in points if point.state is not None)
    states = {number: _state(model, number, arrays) for number in numbers}
    points = [p._replace(state=None if p.state is None else states[p.state]) for p in points]
    tokens = record["tokens"]
    if tokens:
        tokens = token_ids(tokens, "tokens", model.cfg.vocab_size).tolist()
    # Files of earlier versions have the second name.
    name = "max_snapshots" if "max_snapshots" in record else "max_turns"
    return Contents(tokens, points, record[name])


def _state(model: LM, number: int, arrays: Mapping[str, np.ndarray]) -> Any:
    like = jax.eval_shape(lambda: model.init_state(1))
    leaves = []
    for name in _named(like):
        array = arrays[f"{number}/{name}"]
        leaves.append(jnp.asarray(array))
        if leaves[-1].dtype != array.dtype:
            raise ArgumentError(f"{name} is {array.dtype}, which needs jax_enable_x64")
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    check_stack_state(model.cfg, state, 1)
    return state


def _named(state: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _check_same(path: Path, name: str, record: Mapping[str, Any], expected: str) -> None:
    stored = record.get(name)
    if stored != expected:
        raise ConfigError(
            f"{quote_path(path)} must be a session of the {name} {expected[:12]!r} (fingerprint), "
            f"got {quote(str(stored)[:12])}; use the model and the tokenizer that it was saved "
            "with, or start a new session."
        )
