"""xLSTM in JAX: recurrent cells and sequence ops. Models are in `xlstm_jax.modules`."""

from xlstm_jax import cells, ops

__version__ = "0.1.0"

__all__ = ["__version__", "cells", "ops"]
