"""The loss on held-out data during a run."""

from collections.abc import Callable

from xlstm_jax.data import loader
from xlstm_jax.data.batch import Examples
from xlstm_jax.train.losses import HeldOut
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.typing import PyTree

Evaluate = Callable[[PyTree, Callable[[], bool]], dict[str, float] | None]


def make_evaluate(program: TrainProgram, examples: Examples) -> Evaluate:
    """The function `(params, should_stop) -> metrics`, over `eval_batches` of a split.

    These are windows spread evenly over the split, the same ones each time; see
    `data.eval_batches`. Means are over all their tokens. None if it was told to stop.
    """
    data, limit = program.cfg.data, program.cfg.train.eval_batches

    def evaluate(params: PyTree, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        total = HeldOut()
        for batch in loader.eval_batches(examples, data, limit):
            if should_stop():
                return None
            sums = program.held_out_sums(params, program.devices.batch(batch))
            total = total.plus(sums, batch, examples)
        metrics = {
            "valid_loss": total.nats_per_token,
            "valid_accuracy": total.num_correct / total.num_tokens,
            "valid_tokens": total.num_tokens,
        }
        if total.bits_per_byte is not None:
            metrics["valid_bits_per_byte"] = total.bits_per_byte
        return metrics

    return evaluate
