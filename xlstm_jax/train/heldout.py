"""The loss on held-out text while a run goes on."""

import math
from collections.abc import Callable
from typing import Any

import jax

from xlstm_jax.data import DataConfig, Examples, Windows, loader
from xlstm_jax.sharding import Devices, use_rules
from xlstm_jax.train import losses
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import PyTree

Evaluate = Callable[[PyTree, Callable[[], bool]], dict[str, float] | None]


def make_evaluate(
    model: Any, examples: Examples, data: DataConfig, train: TrainConfig, devices: Devices
) -> Evaluate:
    """The function `(params, should_stop) -> metrics` over the first `eval_batches` of a split.

    Means are over all tokens, the short last batch included. Text has `valid_bits_per_byte`, the
    measure that does not depend on the tokenizer. None if it was told to stop.
    """

    @jax.jit
    def sums(params, batch):
        with use_rules(devices.rules):
            return losses.language_model_loss(model, params, batch, train)[1]

    def evaluate(params: PyTree, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        ce = tokens = correct = 0.0
        num_bytes = 0
        for batch in loader.eval_batches(examples, data, train.eval_batches):
            if should_stop():
                return None
            found = jax.device_get(sums(params, devices.batch(batch)))
            # Python floats: sums over a whole split outgrow float32.
            ce += float(found.ce_sum)
            tokens += float(found.weight_sum)
            correct += float(found.correct_sum)
            if isinstance(examples, Windows):
                num_bytes += examples.tokenizer.num_bytes(batch.targets[batch.weights > 0])
        metrics = {
            "valid_loss": ce / tokens,
            "valid_accuracy": correct / tokens,
            "valid_tokens": int(tokens),
        }
        if num_bytes:
            metrics["valid_bits_per_byte"] = ce / math.log(2) / num_bytes
        return metrics

    return evaluate
