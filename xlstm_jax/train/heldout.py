"""The loss on held-out data during a run."""

from collections.abc import Callable

import jax

from xlstm_jax.data import loader
from xlstm_jax.data.batch import Examples
from xlstm_jax.sharding.rules import use_rules
from xlstm_jax.train.losses import HeldOut, held_out_sums
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.typing import PyTree

Evaluate = Callable[[PyTree, Callable[[], bool]], dict[str, float] | None]


def make_evaluate(program: TrainProgram, examples: Examples) -> Evaluate:
    """The function `(params, should_stop) -> metrics`, over `eval_batches` of a split.

    These are windows spread evenly over the split, the same ones each time; see
    `data.eval_batches`. Means are over all their tokens. None if it was told to stop.
    """
    cfg, devices = program.cfg, program.devices

    @jax.jit
    def sums(params, batch):
        with use_rules(devices.rules):
            resets = cfg.train.document_resets
            return held_out_sums(program.model, params, batch, document_resets=resets)

    def evaluate(params: PyTree, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        total = HeldOut()
        for batch in loader.eval_batches(examples, cfg.data, cfg.train.eval_batches):
            if should_stop():
                return None
            total = total.plus(sums(params, devices.batch(batch)), batch, examples)
        metrics = {
            "valid_loss": total.nats_per_token,
            "valid_accuracy": total.num_correct / total.num_tokens,
            "valid_tokens": total.num_tokens,
        }
        if total.bits_per_byte is not None:
            metrics["valid_bits_per_byte"] = total.bits_per_byte
        return metrics

    return evaluate
