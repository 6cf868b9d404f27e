"""The commands of `xlstm-jax`."""

from xlstm_jax.cli.main import main

__all__ = ["main"]
