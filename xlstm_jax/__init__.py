"""xLSTM in JAX: recurrent cells and sequence ops. Models are in `xlstm_jax.modules`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlstm_jax import cells, ops

__version__ = "0.1.0"

__all__ = ["__version__", "cells", "ops"]


def __getattr__(name: str) -> Any:
    # Imported when it is used: processes that only handle data then need no JAX.
    if name in ("cells", "ops"):
        return importlib.import_module(f"xlstm_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
