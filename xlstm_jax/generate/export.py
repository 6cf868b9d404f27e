"""Export of a trained model: prefill and decode as programs of `jax.export`, in one file.

The file needs only JAX and flatbuffers: `docs/run_exported.py` runs it without this library. It is
a safetensors file (see `container`) with these arrays:

    weights/PATH       parameters as `prepare_params` returns them, which are fast to decode with
    programs/prefill   bytes of a serialized program
    programs/decode
    tokenizer/NAME     bytes of a file of the tokenizer, if it has any

Arguments and results of programs are dicts of arrays by name, which need no type of this
library. The batch size is symbolic.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from xlstm_jax.config import fingerprint, to_dict, user_path
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, import_optional, quote
from xlstm_jax.generate import container, prefill
from xlstm_jax.generate.arguments import check_tokenizer
from xlstm_jax.generate.exported import KIND, Arrays
from xlstm_jax.generate.prepare import is_prepared, prepare_params
from xlstm_jax.modules.lm import LM
from xlstm_jax.modules.stack import unstack_layers
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.typing import Array

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PREFILL_WIDTH = 128
"""Positions of a call of the prefill program, which are a static shape. A wider pass wastes more on
short prompts, a narrower one reads long prompts more slowly."""


def export_model(
    path: str | Path,
    model: LM,
    variables: Any,
    *,
    tokenizer: Tokenizer | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes a model as one file that JAX runs without this library.

    Programs are plain XLA, without kernels of this library, and so the same on every platform.

    Args:
        variables: of the model, or what `prepare_params` returned, such as 8-bit weights.
        tokenizer: its files are included.
        platforms: names of `PLATFORMS` that the programs run on; none has to be attached.

    Raises:
        ArgumentError, ConfigError: an argument is invalid, or a package is not installed.
        OSError: the file cannot be written.
    """
    path = user_path(path)
    check_platforms(platforms)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.cfg.vocab_size)
    import_optional("flatbuffers", "an exported model", install="xlstm-jax[export]")
    variables = variables if is_prepared(variables) else prepare_params(model, variables)
    first = jax.eval_shape(lambda: unstack_layers(model.cfg.pattern, model.init_state(1)))
    programs = _programs(model, variables, first, tuple(platforms))
    record = {
        "config": to_dict(model.cfg),
        "fingerprint": fingerprint(model.cfg),
        "jax": jax.__version__,
        "platforms": list(platforms),
        "prefill_width": PREFILL_WIDTH,
        "vocab_size": model.cfg.vocab_size,
        "state": {
            name: {"shape": leaf.shape, "dtype": leaf.dtype.name}
            for name, leaf in _named(first).items()
        },
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "eos_id": None if tokenizer is None else tokenizer.eos_id,
    }
    arrays = {f"weights/{name}": np.asarray(leaf) for name, leaf in _named(variables).items()}
    arrays |= {f"programs/{name}": _as_array(data) for name, data in programs.items()}
    if tokenizer is not None:
        arrays |= {f"tokenizer/{name}": _as_array(x) for name, x in _files(tokenizer).items()}
    container.write(path, KIND, record, arrays)


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises ArgumentError for a name that is not in `PLATFORMS`, or for none at all."""
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS):
        raise ArgumentError(
            f"platforms must be a list of names from {', '.join(PLATFORMS)}, got "
            f"{quote(platforms)}; an NVIDIA GPU is 'cuda'."
        )


def _programs(
    model: LM, variables: Any, first: Any, platforms: tuple[str, ...]
) -> dict[str, bytearray]:
    """The serialized programs, traced with a symbolic batch size; `first` is like the state."""
    structure, names = jax.tree.structure(variables), list(_named(variables))
    state_structure, state_names = jax.tree.structure(first), list(_named(first))

    def unpacked(weights: Arrays, state: Arrays) -> tuple[Any, Any]:
        return (
            structure.unflatten([weights[name] for name in names]),
            state_structure.unflatten([state[name] for name in state_names]),
        )

    def read(weights: Arrays, state: Arrays, logits: Array, tokens: Array, mask: Array):
        variables, layers = unpacked(weights, state)
        logits, layers = prefill.run_pass(model, variables, tokens, mask, layers, logits)
        return logits, _named(layers)

    def decode(weights: Arrays, state: Arrays, tokens: Array):
        variables, layers = unpacked(weights, state)
        logits, layers = model.apply(variables, tokens[:, None], state=layers)
        return logits[:, 0], _named(layers)

    spec = jax.ShapeDtypeStruct
    (b,) = export.symbolic_shape("b")
    shared = (
        {name: spec(x.shape, x.dtype) for name, x in _named(variables).items()},
        {name: spec((b, *x.shape[1:]), x.dtype) for name, x in _named(first).items()},
    )
    logits = spec((b, model.cfg.vocab_size), jnp.float32)
    tokens, mask = (spec((b, PREFILL_WIDTH), dtype) for dtype in (jnp.int32, jnp.bool_))
    calls = {
        "prefill": (read, (*shared, logits, tokens, mask)),
        "decode": (decode, (*shared, spec((b,), jnp.int32))),
    }
    # Always for a CPU: workarounds for its compiler are harmless elsewhere, and
    # without them results on a CPU may be wrong (`ops.cpu.materialize`).
    with jax.default_device("cpu"):
        return {
            name: export.export(jax.jit(fn), platforms=platforms)(*specs).serialize()
            for name, (fn, specs) in calls.items()
        }


def _named(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in the order of the leaves."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _as_array(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer; one with a name, such as "byte", has none."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
