"""The synthetic tasks by name: each entry is a data set of that name."""

from xlstm_jax.data.synthetic import (
    automata,
    counting,
    expressions,
    listops,
    mqar,
    parity,
    stack,
    strings,
)
from xlstm_jax.data.synthetic.tasks import SyntheticTask

FORMAL_LANGUAGES: tuple[SyntheticTask, ...] = (
    parity.TASK,
    automata.EVEN_PAIRS,
    automata.CYCLE_NAVIGATION,
    automata.MODULAR_ARITHMETIC,
    expressions.MODULAR_ARITHMETIC_BRACKETS,
    expressions.SOLVE_EQUATION,
    stack.TASK,
    strings.REVERSE_STRING,
    strings.BUCKET_SORT,
    strings.MISSING_DUPLICATE,
    strings.ODDS_FIRST,
    strings.REPETITION,
    strings.SET,
    counting.MAJORITY,
    counting.MAJORITY_COUNT,
)
"""The fifteen tasks of arXiv:2405.04517, appendix B.1.1, in the order of its classes."""

OTHERS: tuple[SyntheticTask, ...] = (mqar.TASK, listops.TASK)
"""Associative recall and ListOps; `nearest_neighbor` has vectors instead of tokens."""

TASKS: dict[str, SyntheticTask] = {task.name: task for task in (*FORMAL_LANGUAGES, *OTHERS)}
"""All tasks with a data set. A further task needs its own entry here and nothing else."""
