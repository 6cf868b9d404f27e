"""Where a trained model is: a run, a folder of `transformers`, or hf://ORG/NAME[@REVISION]."""

import os
from pathlib import Path
from typing import NamedTuple

from xlstm_jax import hub
from xlstm_jax.convert import hf, remote
from xlstm_jax.data.config import DataConfig
from xlstm_jax.data.tokenizers import ByteTokenizer
from xlstm_jax.data.tokenizers.locate import has_tokenizer
from xlstm_jax.errors import ConfigError, quote_path
from xlstm_jax.train import rundir
from xlstm_jax.train.checkpoint import restore_params
from xlstm_jax.train.checkpoint.unstacked import restore_unstacked
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.typing import PyTree


class Model(NamedTuple):
    """A trained model, and what commands need besides."""

    cfg: ExperimentConfig  # of a run; `data` and `train` are defaults if it is not one
    params: PyTree
    tokenizer: str | None  # name or path for `tokenizers.get`; None: it has none
    is_run: bool  # whether `cfg` says on which data it was trained


def load(
    source: str | Path,
    step: int | None = None,
    *,
    ema: bool = False,
    needs_tokenizer: bool = True,
    unstacked: bool = False,
) -> Model:
    """Loads a model; one that is not a run is sharded over the active mesh, if any.

    Args:
        source: a run, a folder of transformers, or hf://ORG/NAME[@REVISION].
        step: the checkpoint of a run; None: the newest.
        ema: use the moving average of the parameters of a run.
        needs_tokenizer: raise ConfigError for a missing tokenizer before parameters are read.
        unstacked: read the weights as `generate.prepare_params` needs them, layer by layer, without
            a second copy of them in memory.

    Raises:
        ConfigError: the source is none of these, or has no tokenizer and needs one.
        CheckpointError: a checkpoint is corrupt.
        WeightsError: a file of weights is corrupt, or does not match its config.
        NetworkError: the hub cannot be reached.
    """
    if hub.is_address(source):
        _check_applies(source, step, ema=ema)  # before a download
    path = remote.find(source)
    if not any(os.path.exists(path / name) for name in rundir.MARKS):
        is_folder = "has no config.json" if os.path.isdir(path) else "is a file"
        is_other = is_folder if os.path.exists(path) else "does not exist"
        raise ConfigError(
            f"{quote_path(path)} {is_other}; pass the folder of a run or of a model of "
            "transformers, or hf://ORG/NAME."
        )
    if rundir.is_run(path):
        restore = restore_unstacked if unstacked else restore_params
        cfg, params = restore(path, step, ema=ema)
        return Model(cfg, params, rundir.tokenizer_of(path, cfg.data.tokenizer), is_run=True)
    _check_applies(source, step, ema=ema)
    lm, read = hf.open_folder(path)
    tokenizer = _tokenizer_of(path, lm.vocab_size)
    if tokenizer is None and needs_tokenizer:
        raise ConfigError(
            f"{quote_path(source)} must have a tokenizer.json or a *.model of sentencepiece, but "
            "has neither; copy the file of its tokenizer to the folder."
        )
    name, data = path.resolve().name, DataConfig()
    cfg = ExperimentConfig(name=name, model=lm, data=data, train=TrainConfig())
    return Model(cfg, read(unstacked=unstacked), tokenizer, is_run=False)


def _check_applies(source: str | Path, step: int | None, *, ema: bool) -> None:
    """Raises ConfigError if an option for runs is set for a source that is not a run."""
    for name, value in (("step", step), ("ema", ema or None)):
        if value is not None:
            raise ConfigError(
                f"{name}={value} applies to a run only, got {quote_path(source)}, a folder of "
                f"transformers; leave --{name} out."
            )


def require_data(model: Model, source: str, data: str | None) -> None:
    """Raises ConfigError if it is unknown on which `data` a model is to be evaluated."""
    if data is None and not model.is_run:
        raise ConfigError(
            f"{quote_path(source)} is a folder of transformers, which names no data; give them "
            "with --source."
        )


def _tokenizer_of(folder: Path, vocab_size: int) -> str | None:
    """The tokenizer of a folder of transformers."""
    if has_tokenizer(folder):
        return str(folder)
    # It has no file: models of bytes are written without one.
    byte = ByteTokenizer()
    return byte.name if vocab_size == byte.vocab_size else None
