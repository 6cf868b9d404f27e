"""Command lines to dataclasses: parsed and typed by tyro, refused with a one-line message."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from xlstm_jax.config import ConfigError, import_module, load_config
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
        if presets_too and args[0] in presets.names():
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
    asks_for_help, words = _asks_for_help(args), io.StringIO()
    if not asks_for_help:
        _import_modules(args)
    # Alone, as tyro leaves arguments that it has read out of the help.
    args = ["--help"] if asks_for_help else list(args)
    try:
        with contextlib.redirect_stderr(words), _columns(None if asks_for_help else "10000"):
            return tyro.cli(cls, prog=f"xlstm-jax {command}", args=args, **given)
    except SystemExit as end:
        if not end.code:
            raise
        sentence = _sentence(words.getvalue(), command, cls)
    raise ConfigError(sentence)


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


@contextlib.contextmanager
def _columns(count: str | None) -> Iterator[None]:
    """The width of the terminal as tyro sees it: a wide one keeps its messages in one line."""
    before = os.environ.get("COLUMNS")
    try:
        if count is not None:
            os.environ["COLUMNS"] = count
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _sentence(box: str, command: str, cls: type) -> str:
    """What tyro says in a box, in one sentence."""
    complaint = _complaint(box)
    see = f"see `xlstm-jax {command} --help`."
    kind, _, rest = complaint.partition(": ")
    if kind == "Unrecognized options":
        return _unknown(rest.split(", "), command, cls)
    if kind.startswith("Error parsing"):
        where = kind.removeprefix("Error parsing ")
        # A dataclass that refused its fields has a message of its own.
        return f"invalid value for {where}: {rest}; {see}" if where.startswith("-") else rest
    if kind.startswith("Missing from"):
        return f"`xlstm-jax {command}` needs {rest.replace(' (required)', '')}; {see}"
    complaint = complaint.rstrip(".").replace(". Expected", ", expected")
    return f"{complaint[0].lower()}{complaint[1:]}; {see}"


def _complaint(box: str) -> str:
    """The first part of the box below its title; the others repeat the help.

    Frames and rules are drawn in ASCII where the output is, and coloured where it is a terminal.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip("─-╰╯│ "):
            parts[-1].append(line.strip("│ "))
        else:
            parts.append([])
    return " ".join(next(filter(None, parts)))


def _unknown(tokens: Sequence[str], command: str, cls: type) -> str:
    name = next((token for token in tokens if token.startswith("-")), tokens[0]).split("=")[0]
    near = difflib.get_close_matches(name.replace("-", "_"), _normal(_names(cls)), n=3)
    # Of a dotted name the last part is what people remember: lr for train.lr.
    near = near or [n for n in _normal(_names(cls)) if n.endswith("." + name.lstrip("-"))]
    names = " or ".join(_normal(_names(cls))[n] for n in near)
    hint = f"did you mean {names}?" if near else f"see `xlstm-jax {command} --help`."
    return f"{name} is not an option of `xlstm-jax {command}`; {hint}"


def _normal(names: Sequence[str]) -> dict[str, str]:
    """Names as people may write them, to the names themselves."""
    return {name.replace("-", "_"): name for name in names}


def _names(cls: type, prefix: str = "--") -> list[str]:
    """The options of a command, those of nested dataclasses dotted."""
    names = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = "" if field.name == "experiment" else f"{field.name}."
            names += _names(hints[field.name], prefix + inner)
        elif field.name not in ("config", "run", "folder", "options"):
            name = {"imports": "import"}.get(field.name, field.name)
            names.append(prefix + name.replace("_", "-"))
    return names
