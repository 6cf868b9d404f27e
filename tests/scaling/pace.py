"""Slows down training in the jobs of a cluster, so that tests can interrupt runs of few steps."""

import os
import time

from xlstm_jax.train.loop import Loop

SECONDS = 0.03  # of a step

if "SLURM_JOB_ID" in os.environ:
    record = Loop._record

    def paced(self):
        time.sleep(SECONDS)
        record(self)

    Loop._record = paced
