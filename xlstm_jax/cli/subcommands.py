"""Commands that consist of further commands, such as `xlstm-jax data prepare`."""

from collections.abc import Callable, Mapping, Sequence

from xlstm_jax.cli import console
from xlstm_jax.cli.exit_codes import BAD_ARGUMENT, DONE
from xlstm_jax.config import ConfigError, did_you_mean
from xlstm_jax.errors import quote


def run(
    command: str, commands: Mapping[str, Callable[[list[str]], int]], argv: Sequence[str]
) -> int:
    """Runs the one of `commands` that the first argument names, and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  xlstm-jax {command} {name} --help" for name in commands]
        console.write("\n".join(["Show the options of a command:", "", *lines, ""]))
        return DONE if argv else BAD_ARGUMENT
    if argv[0] not in commands:
        hint = did_you_mean(argv[0], commands)
        raise ConfigError(f"unknown command {quote(f'{command} {argv[0]}')}; {hint}")
    return commands[argv[0]](list(argv[1:]))
