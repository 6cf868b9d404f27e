"""`xlstm-jax convert hf-to-run` and `run-to-hf`: imports and exports `transformers` weights."""

import contextlib
import dataclasses
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from xlstm_jax import convert
from xlstm_jax.cli import console, options, subcommands
from xlstm_jax.cli.exit_codes import DONE, WRONG_RESULT
from xlstm_jax.config import ConfigError, read_json, to_dict
from xlstm_jax.convert import compare, hf, license, tensors
from xlstm_jax.data.config import DataConfig
from xlstm_jax.errors import quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.checkpoint import restore_params
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.typing import PyTree

SPECIAL_TOKENS = "special_tokens.json"
"""File in a converted run: the special token ids of the source config, written back on export."""

LICENSE = "license of the weights"

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfToRun(options.ModelCommand):
    """Converts a checkpoint folder of `transformers` to a run, to evaluate or to train further."""

    folder: Folder  # checkpoint with config.json and safetensors files
    run: options.RunPath  # directory of the run; must be new or empty
    dtype: Dtype | None = None  # of activations; None: the dtype in the folder's config
    compare: bool = False  # compare the logits with those of transformers, in float32
    data: DataConfig = DataConfig()  # data of the run
    train: TrainConfig = TrainConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunToHf(options.ModelCommand):
    """Converts a run to a checkpoint folder that `transformers` loads."""

    run: options.RunPath  # directory of a run
    folder: Folder  # output; must be new or have no weights
    step: int | None = None  # checkpoint to convert; None: the newest
    dtype: Dtype = "float32"  # of the stored tensors
    max_shard_bytes: int = 10**9  # largest size of one file
    compare: bool = False  # compare the logits with those of transformers, in float32


def run(argv: list[str]) -> int:
    """Runs a conversion; returns 0, or 5 if `--compare` measured different logits.

    Raises:
        ConfigError: an option, the run or the weights are invalid; nothing has been written.
    """
    with _short_warnings():
        return subcommands.run("convert", CONVERSIONS, argv)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Prints warnings about the weights as one line, without their source location."""

    def show(message: Warning | str, category: type[Warning], *location: Any) -> None:
        if issubclass(category, tensors.WeightsWarning):
            print(f"xlstm-jax: {message}", file=sys.stderr)
        else:
            show_others(message, category, *location)

    show_others = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _hf_to_run(argv: list[str]) -> int:
    args = options.parse("convert hf-to-run", HfToRun, argv)
    if args.run.exists() and (not args.run.is_dir() or any(args.run.iterdir())):
        raise ConfigError(
            "RUN must be a new or an empty folder, got "
            f"{quote_path(args.run)!r}; choose another one."
        )
    model, params = convert.load_hf(args.folder, dtype=args.dtype)
    cfg = ExperimentConfig(
        name=args.run.resolve().name, model=model, data=args.data, train=args.train
    )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    facts = {"num_params": num_params, "converted_from": str(args.folder)}
    try:
        rundir.prepare(args.run, cfg, facts, step=0)
        license_name = license.copy(args.folder, args.run)
        special_tokens = hf.special_tokens_of(args.folder, model.vocab_size)
        rundir.write_json(args.run / SPECIAL_TOKENS, special_tokens)
        checkpoint.save_params(args.run, params, to_dict(cfg))
    except BaseException:
        shutil.rmtree(args.run, ignore_errors=True)  # never leave an incomplete run behind
        raise
    fields = {"written": str(args.run), "parameters": f"{num_params:,}", LICENSE: license_name}
    fields["tokenizer"] = f"{cfg.data.tokenizer!r} of the run; that of the folder is not imported"
    return _report(fields, args.folder if args.compare else None)


def _run_to_hf(argv: list[str]) -> int:
    args = options.parse("convert run-to-hf", RunToHf, argv)
    tensors.check_writable(args.folder)
    cfg, params = restore_params(args.run, args.step)
    license_name = save(
        args.run,
        args.folder,
        cfg.model,
        params,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_bytes,
    )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    fields = {"written": str(args.folder), "parameters": f"{num_params:,}", LICENSE: license_name}
    return _report(fields, args.folder if args.compare else None)


def save(run: Path, folder: Path, cfg: LMConfig, params: PyTree, **options: Any) -> str:
    """Writes parameters of a run in the layout of transformers, and returns their license.

    `options` are those of `convert.save_hf`.
    """
    tokens_file, tokens = run / SPECIAL_TOKENS, hf.SPECIAL_TOKENS
    if tokens_file.exists():
        where = quote_path(tokens_file)
        tokens = hf.check_special_tokens(read_json(tokens_file), cfg.vocab_size, where)
    convert.save_hf(folder, cfg, params, special_tokens=tokens, **options)
    if license.copied_file(run):
        return license.copy(run, folder)
    return "none: the weights were trained in this run; choose one"


def _report(fields: dict[str, str], compared: Path | None) -> int:
    """Prints the fields and, if a folder is given, how its logits differ from the reference."""
    agrees = True
    try:
        if compared is not None:
            difference, agrees, versions = compare.with_transformers(compared)
            fields["logits"] = f"differ from those of {versions} by {difference:.1e} of the largest"
    except compare.TransformersError as error:
        fields["logits"] = f"not compared: {error}"
    console.print_fields(fields)
    return DONE if agrees else WRONG_RESULT


CONVERSIONS = {"hf-to-run": _hf_to_run, "run-to-hf": _run_to_hf}
"""Name of a conversion -> its function."""
