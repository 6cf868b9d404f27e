"""What a run would take of hardware that is not here: its real step, compiled for it."""

from xlstm_jax.plan.report import Plan, plan
from xlstm_jax.plan.search import fit
from xlstm_jax.plan.topology import Target, find_target

__all__ = ["Plan", "Target", "find_target", "fit", "plan"]
