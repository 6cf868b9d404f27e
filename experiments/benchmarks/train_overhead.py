"""What do metrics, gate statistics and the guard cost? The full loop against a bare one, on a CPU.

Target: at most 2 % of the step time of the default run, `experiments/char_lm.py --size cpu`.

    python experiments/benchmarks/train_overhead.py --out RESULT.json

The full loop is `fit` with its defaults: its data, guard, metrics, records and gate statistics.
Evaluation, checkpoints and compilation are not part of a step, and are left out. The bare loop
repeats the smallest train step of the same model, loss and optimizer: it returns the loss, without
guard and metrics, and its batch is on the device. Blocks of both alternate in one process, so that
other load affects both alike; each block of the full loop is compared with the mean of the bare
blocks before and after it. As many blocks as have one computation of the gate statistics make a
period; the result is the median over periods. Use an otherwise idle machine.
"""

import dataclasses
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import char_lm
from experiments.benchmarks import measure
from xlstm_jax import cpu, data
from xlstm_jax.config import to_dict
from xlstm_jax.modules import LM
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.train import Evaluator, ExperimentConfig, fit, init_state, make_optimizer
from xlstm_jax.train.losses import language_model_loss

TARGET = 0.02
"""Largest share of a bare step that the full loop may add."""

BLOCK = 20
"""Steps of a block; short, as the speed of a virtual machine changes within seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: periods of `train.watch_every` steps of each loop."""

    repeats: int = 8


def main(args: Arguments) -> int:
    """Times both loops and writes the result."""
    cpu.prepare()
    cfg = char_lm.config("cpu")
    train = dataclasses.replace(
        cfg.train,
        steps=cfg.train.watch_every * args.repeats + BLOCK,
        eval_every=0,
        checkpoint_every=0,
    )
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(train, checkpoint_minutes=0))
    with tempfile.TemporaryDirectory() as folder:
        full, bare, waits = run(cfg, pathlib.Path(folder, "run"))
    beside = [(before + after) / 2 for before, after in itertools.pairwise(bare)]
    size = cfg.train.watch_every // BLOCK
    periods = [slice(n, n + size) for n in range(0, len(full), size)]
    shares = [sum(full[period]) / sum(beside[period]) - 1 for period in periods]
    result = measure.run_info("train_overhead") | {
        "config": to_dict(cfg),
        "block_steps": BLOCK,
        "full": measure.summary([seconds / BLOCK for seconds in full]),
        "bare": measure.summary([seconds / BLOCK for seconds in bare]),
        "data_wait_seconds": float(np.median(waits)),
        "overheads": shares,
        "overhead": float(np.median(shares)),
        "target": TARGET,
    }
    print(
        f"{1e3 * result['full']['median_seconds']:.1f} ms a step of the full loop, "
        f"{1e3 * result['bare']['median_seconds']:.1f} ms of the bare one: "
        f"{result['overhead']:+.1%}, target {TARGET:.0%}"
    )
    measure.write(args.out, result)
    return 0


def run(
    cfg: ExperimentConfig, run_dir: pathlib.Path
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the blocks of `fit` and of the bare loop between them, and waits for data."""
    advance, full, bare, waits = bare_loop(cfg), list[float](), list[float](), list[float]()
    measure.seconds(advance, 2)  # compiles
    ends: list[float] = []

    def bare_block(params: Any, step: int) -> dict[str, float]:
        # `fit` calls this when the device is idle, and pauses its own clock.
        if ends:  # the first block of `fit` has compiled
            full.append(time.perf_counter() - ends[-1])
        start = time.perf_counter()
        jax.block_until_ready([advance() for _ in range(BLOCK)])
        bare.append(time.perf_counter() - start)
        ends.append(time.perf_counter())
        return {}

    def on_metrics(step: int, record: dict[str, Any]) -> None:
        waits.extend([record["data_wait"]] if "data_wait" in record else [])

    evaluator = Evaluator("bare", bare_block, every=BLOCK)
    fit(cfg, run_dir, evaluators=(evaluator,), on_metrics=on_metrics)
    return full, bare, waits


def bare_loop(cfg: ExperimentConfig) -> Callable[[], jax.Array]:
    """A function that runs one more minimal train step and returns its loss."""
    model, tx = LM(cfg.model), make_optimizer(cfg.train)
    batch = data.batch_at(data.load(cfg.data, "train"), cfg.data, 0)
    batch = jax.device_put(jax.tree.map(np.asarray, batch))

    def loss_fn(params, batch):
        total, sums = language_model_loss(model, params, batch, cfg.train)
        return total / sums.weight_sum

    def train_step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        options = dict(step=state.step, lr_scale=state.lr_scale)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **options)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    compiled = jax.jit(train_step, donate_argnums=0)
    state = init_state(model, tx, random_key(cfg.train.seed), batch.inputs[:1, :1])

    def advance() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, batch)
        return loss

    return advance


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
