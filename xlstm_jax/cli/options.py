"""Command lines to dataclasses: parsed and typed by tyro, refused with a one-line message."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar
from unittest import mock

import tyro

from xlstm_jax.config import ConfigError, did_you_mean, import_module, load_config
from xlstm_jax.data.config import DataConfig
from xlstm_jax.modules import presets
from xlstm_jax.train.config import ExperimentConfig, TrainConfig

T = TypeVar("T")
ConfigPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG.py")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]

# The experiment's fields are options of the command itself: --train.lr, not --experiment.train.lr.
Experiment = Annotated[ExperimentConfig, tyro.conf.arg(name="")]
Imports = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import", metavar="MODULE")
]
IMPORT_VARIABLE = "XLSTM_IMPORT"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCommand:
    """A command that builds a model, with what the modules of a user register."""

    imports: Imports = ()  # import a module first: its name, or the path of a .py file


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithConfig(ModelCommand):
    """A command about the experiment that a CONFIG.py describes; every field of it is an option."""

    config: ConfigPath  # or a run: its folder or its config.json
    size: str | None = None  # for config(size=...) of CONFIG.py: "smoke", "cpu", "paper"
    experiment: Experiment


C = TypeVar("C", bound=WithConfig)


def parse_with_config(
    command: str, cls: type[C], args: Sequence[str], *, presets_too: bool = False
) -> C:
    """As `parse`; the config, which comes first, gives every field of the experiment its default.

    With `presets_too`, the name of a preset may stand for a config.

    Raises:
        ConfigError: as `parse`, or there is no config, or it cannot be used.
    """
    if args and not args[0].startswith("-"):
        _import_modules(args)
        if presets_too and _names_no_file(args[0]):
            experiment = with_preset(args[0])
        else:
            experiment = load_config(args[0], ExperimentConfig, _values_of("--size", args)[-1])
        default = cls(config=Path(args[0]), experiment=experiment)
        return parse(command, cls, args, default)
    if _asks_for_help(args):
        return parse(command, cls, args)
    raise ConfigError(
        f"the config must come first, got {repr(args[0]) if args else 'nothing'}; "
        f"write `xlstm-jax {command} CONFIG.py`, and options after it."
    )


def _names_no_file(config: str) -> bool:
    return not (os.path.exists(config) or os.sep in config or config.endswith((".py", ".json")))


def with_preset(name: str) -> ExperimentConfig:
    model = presets.get(name)
    return ExperimentConfig(name=name, model=model, data=DataConfig(), train=TrainConfig())


def parse(command: str, cls: type[T], args: Sequence[str], default: T | None = None) -> T:
    """The arguments of a command as a `cls`, starting from `default`; runs its `--import`s.

    Raises:
        ConfigError: an option is unknown (names the nearest), lacks a value or cannot have it.
        SystemExit: after `--help`.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    prog = f"xlstm-jax {command}"
    if _asks_for_help(args):
        # Alone, as tyro leaves arguments that it has read out of the help.
        return tyro.cli(cls, prog=prog, args=["--help"], **given)
    _import_modules(args)
    box = io.StringIO()
    try:
        # tyro breaks the words of its messages in a narrow terminal.
        with contextlib.redirect_stderr(box), mock.patch.dict(os.environ, COLUMNS="10000"):
            parsed, unknown = tyro.cli(
                cls, prog=prog, args=list(args), return_unknown_args=True, **given
            )
    except SystemExit:
        raise ConfigError(_message(box.getvalue(), prog)) from None
    if not unknown:
        return parsed
    name = next((arg for arg in unknown if arg.startswith("-")), unknown[0]).split("=")[0]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"])
    names = dict.fromkeys(re.findall(r"--[a-z][\w.-]*", text.getvalue()))
    hint = did_you_mean(name.replace("_", "-"), names, f"see `{prog} --help`.")
    raise ConfigError(f"{name} is not an option of `{prog}`; {hint}")


def _import_modules(args: Sequence[str]) -> None:
    """Those of the environment, then those of the arguments."""
    names = os.environ.get(IMPORT_VARIABLE, "").split(",") + _values_of("--import", args)[1:]
    for name in filter(None, names):
        import_module(name)


def _values_of(option: str, args: Sequence[str]) -> list[Any]:
    """None, then the values that the option is given before tyro parses it."""
    pairs = zip(args, [*args[1:], None], strict=False)
    return [None] + [
        arg.partition("=")[2] or after
        for arg, after in pairs
        if arg.startswith(option + "=") or (arg == option and after)
    ]


def _asks_for_help(args: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(args)


def _message(box: str, prog: str) -> str:
    """One line for the first part of tyro's box, below its title; the others repeat the help.

    Frames and rules are drawn in ASCII where the output is, and colored where it is a terminal.
    """
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    groups = itertools.groupby(lines, lambda line: bool(line.strip("─-╰╯")))
    text = " ".join(next(group for is_text, group in groups if is_text))
    kind, _, rest = text.partition(": ")
    if kind.startswith("Error parsing"):
        where = kind.removeprefix("Error parsing ")
        # A dataclass that refused its fields has a message of its own.
        if not where.startswith("-"):
            return rest
        text = f"invalid value for {where}: {rest}"
    elif kind.startswith("Missing from"):
        text = f"`{prog}` needs {rest.replace(' (required)', '')}"
    else:
        text = text[0].lower() + text[1:].rstrip(".").replace(". Expected", ", expected")
    return f"{text}; see `{prog} --help`."
