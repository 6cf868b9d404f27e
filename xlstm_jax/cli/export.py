"""`xlstm-jax export MODEL FILE`: prefill and decode as one file that runs without this library."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import tyro

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers
from xlstm_jax.errors import quote_path
from xlstm_jax.generate import export_model, prepare_params
from xlstm_jax.generate.export import check_platforms
from xlstm_jax.modules.lm import LM
from xlstm_jax.train import models

FilePath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(options.ModelCommand):
    """Writes programs and weights of a trained model as one file that runs without this library."""

    model: options.ModelSource  # a run, a folder of transformers, or hf://ORG/NAME[@REVISION]
    file: FilePath  # to write
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")  # that can run it: cpu, cuda, rocm, tpu
    weights: options.Weights | None = None  # their precision; None: that of activations
    step: int | None = None  # checkpoint of a run to load; None: the newest
    ema: bool = False  # of a run: use the moving average of the parameters, of train.ema_decay


def run(argv: list[str]) -> int:
    """Runs `export`; raises ConfigError if an option or the model is invalid."""
    args = options.parse("export", Export, argv)
    check_platforms(args.platforms)
    if args.file.is_dir() or not args.file.absolute().parent.is_dir():
        raise ConfigError(
            f"FILE must be a file in an existing folder, got {quote_path(args.file)}; create the "
            "folder or choose another."
        )
    model = models.load(args.model, args.step, ema=args.ema, needs_tokenizer=False, unstacked=True)
    tokenizer = None if model.tokenizer is None else tokenizers.get(model.tokenizer)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    lm = LM(model.cfg.model)
    variables = prepare_params(lm, {"params": model.params}, dtype=args.weights, consume=True)
    export_model(args.file, lm, variables, tokenizer=tokenizer, platforms=args.platforms)
    console.print_fields(
        {
            "written": str(args.file),
            "bytes": f"{args.file.stat().st_size:,}",
            "parameters": f"{num_params:,}",
            "platforms": ", ".join(args.platforms),
            "tokenizer": "none" if tokenizer is None else tokenizer.name,
            "jax": f"{jax.__version__}; versions up to six months newer can run the file",
        }
    )
    return DONE
