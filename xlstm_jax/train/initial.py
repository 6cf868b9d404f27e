"""`ExperimentConfig.init_from`: the parameters with which a run starts.

The source is a run, a checkpoint folder of `transformers` or hf://ORG/NAME[@REVISION]. Its
architecture is compared before any parameter is read.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.config import ConfigError, differences, flatten, load_config, to_dict
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.processes import log
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.typing import PyTree

# Options of a model that change its results, but not the shapes of its parameters.
_FORMULA = (
    r"(^|\.)(\w*eps|\w*soft_cap|input_gate|forget_gate|normalize|stabilize|\w*activation|final_norm"
    r"|covariance_update|num_\w*heads|num_sinks|window|rotary_\w+)$"
)
_NOTES = ("WEIGHTS_LICENSE.txt", "special_tokens.json")  # of converted weights, in a run


def load_params(program: TrainProgram) -> PyTree:
    """The parameters that `cfg.init_from` names, sharded like those of the program.

    Raises:
        ConfigError: the source does not exist or has another architecture.
        CheckpointError: a checkpoint is corrupt.
        WeightsError: a file of weights is corrupt, or does not match its config.
        NetworkError: the hub cannot be reached.
    """
    source, cfg = _path(program.cfg.init_from), program.cfg
    if rundir.is_run(source):
        _check_model(cfg, load_config(source, ExperimentConfig).model)
        return checkpoint.restore_params(source, shardings=program.devices.shardings)[1]
    from xlstm_jax.convert import hf  # needs safetensors, which is optional

    with program.devices.active():
        model, read = hf.open_folder(source)
        _check_model(cfg, model)
        return read()


def copy_notes(cfg: ExperimentConfig, run_dir: Path) -> None:
    """Copies the license and the special tokens of the initial weights to the run."""
    source = _path(cfg.init_from)
    if rundir.is_run(source):
        for name in _NOTES:
            if (source / name).is_file() and not (run_dir / name).exists():
                shutil.copyfile(source / name, run_dir / name)
        return
    from xlstm_jax.convert import hf, license

    license.copy(source, run_dir)
    tokens = hf.special_tokens_of(source, cfg.model.vocab_size)
    rundir.write_json(run_dir / "special_tokens.json", tokens)


def _path(source: str | None) -> Path:
    assert source is not None
    from xlstm_jax.convert import remote

    path = remote.find(source)
    if not (path / rundir.CONFIG).is_file():
        raise ConfigError(
            f"init_from={quote_path(path)!r} must be a run or a folder of transformers, but has no "
            f"{rundir.CONFIG}; check the path."
        )
    return path


def _check_model(cfg: ExperimentConfig, other: LMConfig) -> None:
    """Raises ConfigError unless the parameters of another model fit; warns of other options."""
    where = f"init_from={quote(cfg.init_from)}"
    if other.vocab_size != cfg.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be {other.vocab_size}, that of {where}, got "
            f"{cfg.model.vocab_size}; change it, and use the tokenizer of those weights."
        )
    ours, theirs = (
        {path_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(param_shapes(model))}
        for model in (cfg.model, other)
    )
    for path in {**ours, **theirs}:
        shape, expected = ours.get(path, "absent"), theirs.get(path, "absent")
        if shape != expected:
            raise ConfigError(
                f"model must have the parameters of {where}, but {path} is {shape} instead "
                f"of {expected}; change model."
            )
    if cfg.model.pattern != other.pattern:
        raise ConfigError(
            f"model.pattern must be {quote(other.pattern)}, that of {where}, got "
            f"{quote(cfg.model.pattern)}; change it."
        )
    if lines := differences(_formula(cfg.model), _formula(other)):
        log.warning("the model is not that of %s: %s", where, "; ".join(lines))


def _formula(model: LMConfig) -> dict[str, Any]:
    """The options in use that change the results of a model with the same parameters."""
    kinds = {BLOCKS[letter].name for letter in model.pattern}
    options = flatten(to_dict(model))
    is_used = {name: "." not in name or name.split(".")[0] in kinds for name in options}
    return {name: x for name, x in options.items() if is_used[name] and re.search(_FORMULA, name)}
