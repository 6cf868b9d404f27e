"""Training: a pure train step, and a loop with checkpoints, evaluation and exact resume."""

from xlstm_jax.train import lora
from xlstm_jax.train.checkpoint import (
    Checkpointer,
    CheckpointError,
    restore_adapters,
    restore_params,
)
from xlstm_jax.train.config import ExperimentConfig, LoraConfig, TrainConfig
from xlstm_jax.train.evaluators import Evaluator
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.optimizer import decay_mask, make_optimizer
from xlstm_jax.train.run import FitResult, fit
from xlstm_jax.train.schedules import make_schedule
from xlstm_jax.train.state import TrainState, eval_params, first_state, init_state
from xlstm_jax.train.step import make_train_step

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DivergedError",
    "Evaluator",
    "ExperimentConfig",
    "FitResult",
    "LoraConfig",
    "TrainConfig",
    "TrainState",
    "decay_mask",
    "eval_params",
    "first_state",
    "fit",
    "init_state",
    "lora",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "restore_adapters",
    "restore_params",
]
