"""`xlstm-jax convert hf-to-run` and `run-to-hf`: weights of `transformers` in and out."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from xlstm_jax import convert
from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import BAD_ARGUMENT, DONE, WRONG_RESULT
from xlstm_jax.config import ConfigError, did_you_mean, read_json, to_dict
from xlstm_jax.convert import compare, hf, license, tensors
from xlstm_jax.data.config import DataConfig
from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.checkpoint import restore_params
from xlstm_jax.train.config import ExperimentConfig, TrainConfig

SPECIAL_TOKENS = "special_tokens.json"
"""In a run made of others' weights: the ids of their config, for the way back."""

LICENSE = "license of the weights"

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfToRun(options.ModelCommand):
    """Makes a run from a checkpoint folder of `transformers`, to evaluate or to train further."""

    folder: Folder  # with config.json and safetensors files
    run: options.RunPath  # the folder of the run; a new one
    dtype: Dtype | None = None  # of activations; None: as the folder says
    compare: bool = False  # the logits with those of transformers, in float32
    data: DataConfig = DataConfig()  # of the run
    train: TrainConfig = TrainConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunToHf(options.ModelCommand):
    """Makes a checkpoint folder that `transformers` loads, from a run of large blocks."""

    run: options.RunPath
    folder: Folder  # a new one
    step: int | None = None  # of the checkpoint; None: the newest
    dtype: Dtype = "float32"  # of the stored tensors
    max_shard_bytes: int = 10**9  # of one file
    compare: bool = False  # the logits with those of transformers, in float32


def run(args: list[str]) -> int:
    """Returns 0, or 5 where `--compare` measured a difference.

    Raises:
        ConfigError: an option, the run or the weights cannot be used; nothing has been written.
    """
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  xlstm-jax convert {name} --help" for name in DIRECTIONS]
        console.say("\n".join(["the options of a conversion:", "", *lines, ""]))
        return DONE if args else BAD_ARGUMENT
    if args[0] not in DIRECTIONS:
        hint = did_you_mean(args[0], DIRECTIONS, f"use one of: {', '.join(DIRECTIONS)}.")
        raise ConfigError(f"unknown conversion {args[0]!r}; {hint}")
    return DIRECTIONS[args[0]](args[1:])


def _hf_to_run(args: list[str]) -> int:
    chosen = options.parse("convert hf-to-run", HfToRun, args)
    if chosen.run.exists() and (not chosen.run.is_dir() or any(chosen.run.iterdir())):
        raise ConfigError(
            f"RUN={str(chosen.run)!r} must be a new folder or an empty one; name another one."
        )
    model, params = convert.load_hf(chosen.folder, dtype=chosen.dtype)
    cfg = ExperimentConfig(
        name=chosen.run.resolve().name, model=model, data=chosen.data, train=chosen.train
    )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    facts = {"num_params": num_params, "converted_from": str(chosen.folder)}
    try:
        rundir.prepare(chosen.run, cfg, facts, step=0)
        terms = license.copy(chosen.folder, chosen.run)
        tokens = hf.special_tokens_of(chosen.folder)
        rundir.write_json(chosen.run / SPECIAL_TOKENS, tokens)
        checkpoint.save_params(chosen.run, params, to_dict(cfg))
    except BaseException:
        shutil.rmtree(chosen.run, ignore_errors=True)  # half a run is none
        raise
    rows = {"written": str(chosen.run), "parameters": f"{num_params:,}", LICENSE: terms}
    rows["tokenizer"] = f"{cfg.data.tokenizer!r} of the run; the folder's is not read"
    if chosen.compare and model.tie_embeddings:
        rows["logits"] = "not compared, as transformers makes a random head for a tied model"
    return _report(rows, chosen.folder if chosen.compare and not model.tie_embeddings else None)


def _run_to_hf(args: list[str]) -> int:
    chosen = options.parse("convert run-to-hf", RunToHf, args)
    tensors.check_free(chosen.folder)
    cfg, params = restore_params(chosen.run, chosen.step)
    tokens = chosen.run / SPECIAL_TOKENS
    convert.save_hf(
        chosen.folder,
        cfg.model,
        params,
        dtype=chosen.dtype,
        max_shard_bytes=chosen.max_shard_bytes,
        special_tokens=read_json(tokens) if tokens.exists() else hf.SPECIAL_TOKENS,
    )
    terms = "they were trained here; it is for you to choose one"
    if license.copied_file(chosen.run):
        terms = license.copy(chosen.run, chosen.folder)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = {"written": str(chosen.folder), "parameters": f"{num_params:,}", LICENSE: terms}
    return _report(rows, chosen.folder if chosen.compare else None)


def _report(rows: dict[str, str], compared: Path | None) -> int:
    """Prints the rows and how the logits of a folder compare, if one is given."""
    agrees = True
    try:
        if compared is not None:
            difference, agrees, versions = compare.with_transformers(compared)
            by = f"{difference:.1e} of the largest"
            rows["logits"] = f"differ from those of {versions} by {by}"
    except compare.TransformersError as error:
        rows["logits"] = f"not compared: {error}"
    console.facts(rows)
    return DONE if agrees else WRONG_RESULT


DIRECTIONS = {"hf-to-run": _hf_to_run, "run-to-hf": _run_to_hf}
"""Word -> what does it."""
