"""`xlstm-jax COMMAND ...`: runs a command and maps its errors to exit codes."""

import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import jax

from xlstm_jax import __version__, cpu
from xlstm_jax.cli.exit_codes import BAD_ARGUMENT, DONE, INTERRUPTED, MACHINE_FAILED
from xlstm_jax.config import did_you_mean
from xlstm_jax.errors import (
    ArgumentError,
    ConfigError,
    NetworkError,
    UnsupportedError,
    printable,
    quote,
    quote_path,
)
from xlstm_jax.sharding.distributed import exit_without_others, is_peer_failure

# Each is a module of this package with `run(argv) -> exit code`, imported only when it runs.
COMMANDS = {
    "train": "train CONFIG.py: train a model, or resume a run",
    "evaluate": "evaluate MODEL...: measure perplexity and tasks, and compare models",
    "generate": "generate MODEL --prompt TEXT: continue a text",
    "export": "export MODEL FILE: prefill and decode as one file that runs without this library",
    "convert": "convert hf-to-run FOLDER RUN, run-to-hf RUN FOLDER: weights in and out, or hf://",
    "data": "data prepare IN OUT, data train-tokenizer IN OUT, data inspect OUT: tokens of text",
    "sweep": "sweep PLAN.py: train the unfinished runs of a sweep, collect their results",
    "report": "report RUN...: compare runs on one HTML page",
    "fit": "fit TABLE: scaling laws from a table of runs, with pictures",
    "predict": "predict --flops C: the best size and tokens for a budget, from fitted laws",
    "replay": "replay RUN/diverged.json: recompute a skipped step",
    "check": "check: compare every implementation of the ops on this device with the recurrence",
    "plan": "plan CONFIG.py --topology v5e:4x4: compile a run for a target that is not attached",
    "describe": "describe CONFIG.py: list shapes, parameters, FLOPs and memory, without training",
}

# Commands that compute almost nothing: `cpu.prepare` would not speed them up, and the freed memory
# that it keeps in the process would raise their peak.
WITHOUT_CPU_SETTINGS = ("convert", "data", "report")

# Errors of the machine; all other errors of the operating system concern a path of the user.
_MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ECHILD,  # a worker of `data prepare` died
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, one of `exit_codes`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] not in WITHOUT_CPU_SETTINGS:
        cpu.prepare()  # has to precede the first computation
    if not sys.stderr.isatty():  # read by the client of the Hugging Face hub when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Orbax and absl would configure the root logger otherwise, with a prefix of their own.
    logging.basicConfig(format="xlstm-jax: %(message)s")
    logging.getLogger().handlers[0].setLevel(logging.WARNING)  # the rest is for process_I.log
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        print("xlstm-jax: interrupted; repeat the command to start again.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        sys.stderr.close()
        return DONE
    except Exception as error:
        code, message = explain(error)
        if code is None:
            if jax.distributed.is_initialized():
                traceback.print_exc()
                exit_without_others(1)
            raise
        print(f"xlstm-jax: {message}", file=sys.stderr)
        exit_without_others(code)
        return code


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: xlstm-jax COMMAND ...\n")
        print("\n".join(f"  xlstm-jax {line}" for line in COMMANDS.values()))
        print("\n`xlstm-jax COMMAND --help` lists the options of a command.")
        return DONE if args else BAD_ARGUMENT
    if args[0] == "--version":
        print(f"xlstm-jax {__version__}")
        return DONE
    if any("\0" in arg for arg in args):
        raise ConfigError("arguments must have no NUL characters; remove them.")
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command {quote(args[0])}; {did_you_mean(args[0], COMMANDS)}")
    return importlib.import_module(f"xlstm_jax.cli.{args[0]}").run(args[1:])


def explain(error: Exception) -> tuple[int | None, str]:
    """Exit code and one-line message of an exception; the code of a bug is None."""
    if isinstance(error, (ArgumentError, UnsupportedError)):
        return BAD_ARGUMENT, str(error)
    if isinstance(error, NetworkError):
        return MACHINE_FAILED, str(error)
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if is_peer_failure(error):
        reason = printable(str(error))[:200]
        return MACHINE_FAILED, (
            f"another process of the run has ended, or the network failed ({reason}); the same "
            "command in all processes resumes."
        )
    # XLA reports exhausted memory, also of the host, by the text of its errors only.
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:
        reason = printable(str(error))[:200] or "MemoryError"
        return MACHINE_FAILED, (
            f"out of memory ({reason}); make data.batch_size, data.seq_len or the model smaller."
        )
    return None, ""


def _explain_os_error(error: OSError) -> tuple[int, str]:
    reason = (error.strerror or str(error)).lower()
    path = error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    where = f"{quote_path(os.fsdecode(path))}: " if path else ""
    if error.errno in _MACHINE_ERRORS or isinstance(error, (ConnectionError, TimeoutError)):
        return MACHINE_FAILED, printable(
            f"{where}{reason}; free or repair it, then repeat the command, which resumes."
        )
    return BAD_ARGUMENT, printable(f"{where}{reason}; pass a path that can be used.")
