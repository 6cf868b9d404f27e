"""Command lines to dataclasses: tyro parses them, errors become one-line messages."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from unittest import mock

import tyro

from xlstm_jax.config import ConfigError, did_you_mean, import_module, load_config, user_path
from xlstm_jax.data.config import DataConfig
from xlstm_jax.errors import quote, quote_path, shorten
from xlstm_jax.modules import presets
from xlstm_jax.train.config import ExperimentConfig, TrainConfig

T = TypeVar("T")
ConfigPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG.py")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
# A run, a folder of transformers, or hf://; a Path would drop one of the slashes.
ModelSource = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
ModelSources = Annotated[
    tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")
]

# Precision of the weights, for `generate.prepare_params`.
Weights = Literal["float32", "bfloat16", "int8"]
# The experiment's fields are options of the command itself: --train.lr, not --experiment.train.lr.
Experiment = Annotated[ExperimentConfig, tyro.conf.arg(name="")]
Imports = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import", metavar="MODULE")
]
IMPORT_VARIABLE = "XLSTM_IMPORT"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCommand:
    """A command that builds a model, possibly from blocks that a user's module registers."""

    imports: Imports = ()  # module to import first: its name, or the path of a .py file


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigCommand(ModelCommand):
    """A command on the experiment of a CONFIG.py, each field of which is an option."""

    config: ConfigPath  # a CONFIG.py, or a run: its directory or its config.json
    size: str | None = None  # argument of config(size=...) in CONFIG.py: "smoke", "cpu", "paper"
    experiment: Experiment


C = TypeVar("C", bound=ConfigCommand)


def parse_with_config(
    command: str, cls: type[C], args: Sequence[str], *, allow_presets: bool = False
) -> C:
    """As `parse`, with the first argument's config as the default of every experiment field.

    With `allow_presets`, the name of a preset may stand for a config.

    Raises:
        ConfigError: as `parse`, or the config is missing or invalid.
    """
    if args and args[0] and not args[0].startswith("-"):
        _import_modules(args)
        config = str(user_path(args[0]))
        is_path = os.path.exists(config) or os.sep in config or config.endswith((".py", ".json"))
        if allow_presets and not is_path:
            experiment = experiment_from_preset(config)
        else:
            experiment = load_config(config, ExperimentConfig, _option_values("--size", args)[-1])
        default = cls(config=Path(config), experiment=experiment)
        return parse(command, cls, args, default)
    if _wants_help(args):
        return parse(command, cls, args)
    raise ConfigError(
        f"the first argument must be a config, got {quote(args[0]) if args else 'none'}; "
        f"write `xlstm-jax {command} CONFIG.py`, with options after it."
    )


def experiment_from_preset(name: str) -> ExperimentConfig:
    """The model of a preset with default data and training; raises ConfigError if it is unknown."""
    model = presets.get(name)
    return ExperimentConfig(name=name, model=model, data=DataConfig(), train=TrainConfig())


def parse(command: str, cls: type[T], args: Sequence[str], default: T | None = None) -> T:
    """Parses arguments into a `cls`, starting from `default`, after running its `--import`s.

    Raises:
        ConfigError: an option is unknown (suggests the nearest), or its value missing or invalid.
        SystemExit: after `--help`.
    """
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    prog = f"xlstm-jax {command}"
    if _wants_help(args):
        # Only --help: tyro omits options that are on the command line from its help.
        return tyro.cli(cls, prog=prog, args=["--help"], **defaults)
    _check_not_empty(prog, args)
    _import_modules(args)
    errors = io.StringIO()
    try:
        # A wide terminal: in a narrow one tyro breaks words of its messages.
        with contextlib.redirect_stderr(errors), mock.patch.dict(os.environ, COLUMNS="10000"):
            parsed, unknown = tyro.cli(
                cls, prog=prog, args=list(args), return_unknown_args=True, **defaults
            )
    except SystemExit:
        raise ConfigError(_message(errors.getvalue(), prog)) from None
    if not unknown:
        return _with_user_paths(parsed)
    name = next((arg for arg in unknown if arg.startswith("-")), unknown[0]).split("=")[0]
    with contextlib.redirect_stdout(io.StringIO()) as help_text, contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"])
    names = dict.fromkeys(re.findall(r"--[a-z][\w.-]*", help_text.getvalue()))
    hint = did_you_mean(name.replace("_", "-"), names, f"see `{prog} --help`.")
    raise ConfigError(f"{quote_path(name)} is not an option of `{prog}`; {hint}")


def _check_not_empty(prog: str, args: Sequence[str]) -> None:
    """An empty path would be the working directory; nothing else has an empty value either."""
    for before, arg in itertools.pairwise([f"the argument of `{prog}`", *args]):
        option, separator, value = arg.partition("=")
        if not arg or (separator and not value):
            raise ConfigError(f"{quote_path(option or before)} must not be empty, got ''; set it.")


def _with_user_paths(args: T) -> T:
    """The arguments with "~" replaced in paths; shells do not replace it in --option=~/path."""
    command: Any = args
    paths = {field.name: getattr(args, field.name) for field in dataclasses.fields(command)}
    changes = {name: user_path(path) for name, path in paths.items() if isinstance(path, Path)}
    return dataclasses.replace(command, **changes)


def check_out(path: Path, option: str = "--out") -> None:
    """Raises ConfigError unless the file can be written: a new or regular one in a folder."""
    is_other = path.exists() and not path.is_file()  # such as a folder or a device
    if not path.parent.is_dir() or is_other or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"{option} must be a file in an existing folder, got {quote_path(path)}; create "
            f"{quote_path(path.parent)}, make it writable or choose another."
        )


def _import_modules(args: Sequence[str]) -> None:
    for name in modules_to_import(args):
        import_module(name)


def modules_to_import(args: Sequence[str]) -> list[str]:
    """The modules of XLSTM_IMPORT, then those of `--import`."""
    names = os.environ.get(IMPORT_VARIABLE, "").split(",") + _option_values("--import", args)[1:]
    return list(filter(None, names))


def _option_values(option: str, args: Sequence[str]) -> list[Any]:
    """None, then the values of an option; needed before tyro parses the command line."""
    pairs = zip(args, [*args[1:], None], strict=False)
    return [None] + [
        arg.partition("=")[2] or following
        for arg, following in pairs
        if arg.startswith(option + "=") or (arg == option and following)
    ]


def _wants_help(args: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(args)


def _message(errors: str, prog: str) -> str:
    """The first paragraph of tyro's boxed error, below its title, as one line.

    The other paragraphs repeat the help. Box and rules may be ASCII or Unicode, and colored.
    """
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", errors).splitlines()[1:]]
    groups = itertools.groupby(lines, lambda line: bool(line.strip("─-╰╯")))
    text = " ".join(next(group for is_text, group in groups if is_text))
    # tyro repeats the value, which may have any length.
    text = shorten(" ".join(shorten(word) for word in text.split(" ")), 500)
    kind, _, rest = text.partition(": ")
    if kind.startswith("Error parsing"):
        option = kind.removeprefix("Error parsing ")
        # Not an option but a dataclass: `rest` is the message of its own check.
        if not option.startswith("-"):
            return rest
        text = f"invalid value for {option}: {rest}"
    elif kind.startswith("Missing from"):
        # "RUN help" or "--prompt STR help": a comma after the placeholder.
        missing = re.sub(r"^((?:--\S+ )?\S+) ", r"\1, ", rest.replace(" (required)", ""))
        text = f"`{prog}` needs {missing}"
    else:
        text = text[0].lower() + text[1:].rstrip(".").replace(". Expected", ", expected")
    return f"{text}; see `{prog} --help`."
