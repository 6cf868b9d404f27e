"""Train steps compiled ahead of time for hardware that is not attached."""

from xlstm_jax.plan.report import Plan, plan
from xlstm_jax.plan.search import Candidate, search
from xlstm_jax.plan.topology import Target, find_target

__all__ = ["Candidate", "Plan", "Target", "find_target", "plan", "search"]
