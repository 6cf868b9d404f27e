"""`xlstm-jax COMMAND ...`: runs a command and maps its errors to exit codes."""

import importlib
import sys
import traceback
from collections.abc import Sequence

from xlstm_jax import __version__, cpu
from xlstm_jax.cli.exit_codes import BAD_ARGUMENT, DONE, INTERRUPTED
from xlstm_jax.config import ConfigError, did_you_mean

# Each is a module of this package with `run(argv) -> exit code`, imported only when it runs.
COMMANDS = {
    "train": "train CONFIG.py: train a model, or resume a run",
    "evaluate": "evaluate RUN: measure perplexity and bits per byte on held-out data",
    "generate": "generate RUN --prompt TEXT: continue a text",
    "convert": "convert hf-to-run FOLDER RUN, run-to-hf RUN FOLDER: import and export weights",
    "plan": "plan CONFIG.py --topology v5e:4x4: compile a run for a target that is not attached",
    "describe": "describe CONFIG.py: list shapes, parameters, FLOPs and memory, without training",
}

# Commands that compute almost nothing: `cpu.prepare` would not speed them up, and the freed memory
# that it keeps in the process would raise their peak.
WITHOUT_CPU_SETTINGS = ("convert",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, one of `exit_codes`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] not in WITHOUT_CPU_SETTINGS:
        cpu.prepare()  # has to precede the first computation
    try:
        return _dispatch(args)
    except (ConfigError, NotImplementedError, ValueError) as error:
        if not _is_raised_by_library(error):
            raise
        print(f"xlstm-jax: {error}", file=sys.stderr)
        return BAD_ARGUMENT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        sys.stderr.close()
        return DONE


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: xlstm-jax COMMAND ...\n")
        print("\n".join(f"  xlstm-jax {line}" for line in COMMANDS.values()))
        print("\n`xlstm-jax COMMAND --help` lists the options of a command.")
        return DONE if args else BAD_ARGUMENT
    if args[0] == "--version":
        print(f"xlstm-jax {__version__}")
        return DONE
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command {args[0]!r}; {did_you_mean(args[0], COMMANDS)}")
    return importlib.import_module(f"xlstm_jax.cli.{args[0]}").run(args[1:])


def _is_raised_by_library(error: Exception) -> bool:
    """Whether this library raised the error; others are bugs, which keep their traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return isinstance(error, ConfigError) or module.startswith("xlstm_jax")
