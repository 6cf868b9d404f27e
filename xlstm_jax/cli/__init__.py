"""The commands of `xlstm-jax`."""

from xlstm_jax.cli.commands import main

__all__ = ["main"]
