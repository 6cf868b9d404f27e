"""Writers of metrics: any object with `write(step, metrics)` and `close()`."""

from xlstm_jax.train.writers.base import CallbackWriter, OptionalWriter, Writer
from xlstm_jax.train.writers.console import ConsoleWriter
from xlstm_jax.train.writers.jsonl import JsonlWriter
from xlstm_jax.train.writers.services import check_services, open_service

__all__ = [
    "CallbackWriter",
    "ConsoleWriter",
    "JsonlWriter",
    "OptionalWriter",
    "Writer",
    "check_services",
    "open_service",
]
