"""Evaluation of trained models: perplexity by position, token frequency and domain, and tasks.

`evaluate.harness` and `evaluate.tasks` need lm-eval and are imported on their own.
"""

from xlstm_jax.evaluate.continuations import Score, score_continuations
from xlstm_jax.evaluate.domains import Domain, Wins, by_domain, wins
from xlstm_jax.evaluate.evaluators import loss_evaluator, position_evaluator
from xlstm_jax.evaluate.frequency import by_frequency, count_tokens
from xlstm_jax.evaluate.perplexity import Perplexity, perplexity
from xlstm_jax.evaluate.position import Bucket, by_position
from xlstm_jax.evaluate.results import Evaluation

__all__ = [
    "Bucket",
    "Domain",
    "Evaluation",
    "Perplexity",
    "Score",
    "Wins",
    "by_domain",
    "by_frequency",
    "by_position",
    "count_tokens",
    "loss_evaluator",
    "perplexity",
    "position_evaluator",
    "score_continuations",
    "wins",
]
