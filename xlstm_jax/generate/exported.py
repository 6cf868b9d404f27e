"""A model from a file of `export_model`."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Integer

from xlstm_jax.config import check_range, user_path
from xlstm_jax.data import tokenizers
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import (
    ArgumentError,
    ConfigError,
    import_optional,
    printable,
    quote_path,
)
from xlstm_jax.generate import container
from xlstm_jax.generate.arguments import Prompts, prompt_ids
from xlstm_jax.modules.checks import difference
from xlstm_jax.typing import Array, Float

KIND = "model"  # of the file
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A model from a file of `export_model`; states are dicts of arrays `B ...`."""

    record: Mapping[str, Any]  # of the file: config, versions, platforms
    tokenizer: Tokenizer | None
    weights: Arrays
    programs: Mapping[str, Callable[..., tuple[Array, Arrays]]]

    def init_state(self, batch_size: int) -> Arrays:
        """The initial state: zeros."""
        check_range("batch_size", batch_size, "at least 1")
        return {
            name: jnp.zeros((batch_size, *leaf["shape"][1:]), leaf["dtype"])
            for name, leaf in self.record["state"].items()
        }

    def prefill(
        self,
        prompts: Prompts,
        state: Arrays | None = None,
    ) -> tuple[Float[Array, "B vocab"], Arrays]:
        """Reads prompts of any lengths; returns the logits after each, and the state.

        Raises:
            ArgumentError: a prompt is empty, or a token is not in the vocabulary.
        """
        ids = prompt_ids(prompts, self.record["vocab_size"])
        lengths = np.array([len(prompt) for prompt in ids])
        width = self.record["prefill_width"]
        total = -(-int(lengths.max()) // width) * width
        tokens = np.zeros((len(ids), total), np.int32)
        for i, prompt in enumerate(ids):
            tokens[i, : len(prompt)] = prompt
        mask = np.arange(total) < lengths[:, None]
        state = self.init_state(len(ids)) if state is None else self._checked(state, len(ids))
        logits = jnp.zeros((len(ids), self.record["vocab_size"]), jnp.float32)
        for start in range(0, total, width):
            part = np.s_[:, start : start + width]
            call = self.programs["prefill"]
            logits, state = call(self.weights, state, logits, tokens[part], mask[part])
        return logits, state

    def decode(
        self, tokens: Integer[Array | np.ndarray, "B"], state: Arrays
    ) -> tuple[Float[Array, "B vocab"], Arrays]:
        """Reads one token per sequence; returns the logits of the next ones, and the state."""
        tokens = jnp.asarray(tokens, jnp.int32)
        return self.programs["decode"](self.weights, self._checked(state, tokens.size), tokens)

    def _checked(self, state: Any, batch_size: int) -> Arrays:
        """The state; raises ArgumentError unless it fits this model and number of sequences."""
        items = self.record["state"].items()
        shapes = {name: (batch_size, *leaf["shape"][1:]) for name, leaf in items}
        # Comparing shapes takes little of the time of a decode step, unlike `difference`.
        if isinstance(state, dict) and {n: jnp.shape(x) for n, x in state.items()} == shapes:
            return state
        problem = difference(state, jax.eval_shape(lambda: self.init_state(batch_size)))
        raise ArgumentError(
            f"state must be that of this model and {batch_size} sequences: {problem}; use "
            f"init_state({batch_size}), or what prefill returned."
        )


def load_exported(path: str | Path) -> ExportedModel:
    """Reads a file of `export_model`. Its programs run like code: load files that you trust only.

    Raises:
        OSError: the file cannot be opened.
        ConfigError: it is damaged, not for this platform, or too old or new for this version of
            JAX; or a package is not installed.
    """
    path = user_path(path)
    import_optional("flatbuffers", "an exported model", install="xlstm-jax[export]")
    record, arrays = container.read(path, KIND)
    groups: dict[str, dict[str, np.ndarray]] = {"weights": {}, "programs": {}, "tokenizer": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = array
    _check_runs_here(path, record)
    try:
        programs = {
            name: jax.jit(export.deserialize(bytearray(array)).call)
            for name, array in groups["programs"].items()
        }
    except Exception as error:  # of many types: versions of the format, of StableHLO, of JAX
        raise ConfigError(
            f"{quote_path(path)} must be from a version of JAX up to six months older than "
            f"{jax.__version__}, got {record['jax']} ({printable(str(error))[:200]}); export the "
            "model again."
        ) from error
    weights = {name: jnp.asarray(array) for name, array in groups["weights"].items()}
    return ExportedModel(record, _tokenizer(record, groups["tokenizer"]), weights, programs)


def _check_runs_here(path: Path, record: Mapping[str, Any]) -> None:
    backend = jax.default_backend()
    names = {"gpu": ("cuda", "rocm")}.get(backend, (backend,))
    if not set(names) & set(record["platforms"]):
        raise ConfigError(
            f"{quote_path(path)} runs on {', '.join(record['platforms'])}, not on {backend}; "
            "export the model for this platform."
        )


def _tokenizer(record: Mapping[str, Any], files: Mapping[str, np.ndarray]) -> Tokenizer | None:
    if record["tokenizer"] is None or not files:
        return None if record["tokenizer"] is None else tokenizers.get(record["tokenizer"])
    with tempfile.TemporaryDirectory() as folder:
        for name, array in files.items():
            (Path(folder) / Path(name).name).write_bytes(array.tobytes())
        return tokenizers.get(folder)
