"""Checkpoints of a run: one directory per step, which appears atomically.

RUN/config.json                     enough to rebuild the model
RUN/checkpoints/STEP/state          train state               (arrays)
RUN/checkpoints/STEP/data           progress                  (JSON)
RUN/checkpoints/STEP/config         config at this step       (JSON)
RUN/checkpoints/STEP/manifest.json  sizes and checksums of all these files

A save writes to STEP.tmp, which is renamed to the bare number when it is complete. A run that
starts from existing parameters has a checkpoint of step 0 with the parameters only.
"""

from xlstm_jax.train.checkpoint.files import (
    FOLDER,
    CheckpointError,
    delete_all,
    latest_step,
    steps,
)
from xlstm_jax.train.checkpoint.restore import (
    has_params_only,
    restore_adapters,
    restore_latest,
    restore_params,
)
from xlstm_jax.train.checkpoint.save import Checkpointer, save_params

__all__ = [
    "FOLDER",
    "CheckpointError",
    "Checkpointer",
    "delete_all",
    "has_params_only",
    "latest_step",
    "restore_adapters",
    "restore_latest",
    "restore_params",
    "save_params",
    "steps",
]
