"""Where should sLSTM blocks be? All patterns, learning rates and seeds in one program.

Published: the sLSTM blocks of xLSTM[7:1] are at chosen positions, half of them early, and no
comparison of positions is printed; at 350M parameters, [7:1] and [1:0] are 0.4 % apart (perplexity
13.48 and 13.43).

Expected of the size cpu: a trained member of the grid has the loss of an ordinary `LM` with its
pattern and parameters, and at its better learning rate every pattern ends below 3.3 bits per byte.
No order of the patterns is expected: the table has every seed.

    python experiments/placement.py --size cpu       # the grid, one JSON file and one plot
    xlstm-jax train experiments/placement.py         # only the pattern mmsm, as an ordinary run

A pattern changes shapes, so patterns are usually separate programs. Here every layer has the
parameters of both kinds of block, and a flag per layer selects the output of one of them. Flags,
seed and learning rate differ between members; all are trained together under `jax.vmap`, on the
same batches. Members with the same seed share their initial parameters. Both blocks are computed:
the record compares the time with that of separate programs of three patterns.

Source: Beck et al. 2024, arXiv:2405.04517, section 4 and table 1. Sizes: smoke (seconds), cpu (the
experiment), paper (the same question for an accelerator, as no such grid is published: wider, eight
blocks, patterns with at most one sLSTM block, alternating ones, and only sLSTM).
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import record
from experiments.benchmarks import measure
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.data import Batch, DataConfig, batch_at, eval_batches, load, tokenizers
from xlstm_jax.flops import count_params
from xlstm_jax.modules import BLOCKS, LM, LMConfig
from xlstm_jax.modules.lm import final_norm, head_kernel
from xlstm_jax.ops import cross_entropy, document_starts, embed
from xlstm_jax.train import ExperimentConfig, TrainConfig
from xlstm_jax.train.grid import evaluate_grid, train_grid
from xlstm_jax.train.losses import token_sums
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import TrainState, first_state
from xlstm_jax.train.step import make_train_step
from xlstm_jax.typing import Array, Bool, Float, PyTree

LEVEL = 3.3
"""Bits per byte that every pattern must go below at the size cpu."""

FLAGS = "is_slstm"
"""Key of the flags in the parameters of a member; they are not trained."""

TIMED_STEPS = 4  # of a separate program; the first half includes its compilation

CPU = ExperimentConfig(
    name="placement",
    model=LMConfig(vocab_size=tokenizers.get("byte").vocab_size, dim=32, pattern="mmsm"),
    data=DataConfig(source="stdlib", seq_len=64, batch_size=8),
    train=TrainConfig(
        steps=200,
        lr=1e-2,
        warmup_steps=0.1,
        grad_clip=1.0,
        guard_floor=1e9,  # large gradients are clipped; no member skips a step that others take
        freeze=f"^{FLAGS}$",
        log_every=20,
        eval_batches=64,
        watch="none",
    ),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=8, pattern="ms"),
    data=dataclasses.replace(CPU.data, source="grammar", seq_len=16, batch_size=2),
    train=dataclasses.replace(CPU.train, steps=8, log_every=4, eval_batches=2),
)
PAPER = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=256, pattern="mmmsmmmm"),
    data=dataclasses.replace(CPU.data, seq_len=512, batch_size=32),
    train=dataclasses.replace(CPU.train, steps=5000, log_every=100, lr=3e-3),
)
SIZES = {"smoke": SMOKE, "cpu": CPU, "paper": PAPER}
RATES = {"smoke": (1e-2,), "cpu": (3e-3, 1e-2), "paper": (1e-3, 3e-3, 1e-2)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "paper": (0, 1, 2)}


class Member(NamedTuple):
    """What differs between the runs of the grid."""

    pattern: str
    lr: float
    seed: int


def config(size: str = "cpu") -> ExperimentConfig:
    """The config of one pattern at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    cfg = SIZES[size]
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, freeze=None))


def patterns(num_blocks: int) -> list[str]:
    """All patterns of up to four blocks; of more, those with a single sLSTM block and a few others.

    In the order of their number of sLSTM blocks.
    """
    if num_blocks <= 4:
        every = ("".join(letters) for letters in itertools.product("ms", repeat=num_blocks))
        return sorted(every, key=lambda pattern: (pattern.count("s"), pattern[::-1]))
    one = ["m" * n + "s" + "m" * (num_blocks - 1 - n) for n in range(num_blocks)]
    mixed = [("sm" * num_blocks)[:num_blocks], ("ms" * num_blocks)[:num_blocks]]
    return ["m" * num_blocks, *one, *mixed, "s" * num_blocks]


def flags_of(pattern: str) -> Bool[np.ndarray, "layers"]:
    """Whether each layer is an sLSTM block."""
    return np.array([letter == "s" for letter in pattern])


def init_params(cfg: LMConfig, key: Array) -> PyTree:
    """Parameters of a model that has an mLSTM and an sLSTM block in every layer."""
    trees = [
        LM(dataclasses.replace(cfg, pattern=letter * cfg.num_blocks)).init(
            jax.random.fold_in(key, number), jnp.zeros((1, 1), jnp.int32)
        )["params"]
        for number, letter in enumerate("ms")
    ]
    stack = {letter: tree["stack"][letter] for letter, tree in zip("ms", trees, strict=True)}
    return trees[0] | {"stack": stack}


def params_of(params: PyTree, pattern: str) -> PyTree:
    """The parameters of an ordinary `LM` with this pattern: the blocks that its flags select."""
    flags, stack = flags_of(pattern), params["stack"]
    masks = {"m": ~flags, "s": flags}
    chosen = {
        letter: jax.tree.map(lambda leaf, mask=masks[letter]: leaf[mask], stack[letter])
        for letter in sorted(set(pattern))
    }
    return params | {"stack": chosen}


def hidden_states(
    cfg: LMConfig, params: PyTree, flags: Bool[Array, "layers"], batch: Batch
) -> Float[Array, "B T D"]:
    """The hidden states of the model whose layers are sLSTM blocks where the flag is set."""
    reset = document_starts(batch.segment_ids)
    mlstm, slstm = (BLOCKS[letter].block(cfg, parent=None) for letter in "ms")

    def layer(x, inputs):
        stack, flag = inputs
        m, _ = mlstm.apply({"params": stack["m"]}, x, reset=reset)
        s, _ = slstm.apply({"params": stack["s"]}, x, reset=reset)
        return jnp.where(flag, s, m), None

    x = embed(batch.inputs, params["token_embedding"]["embedding"])
    x, _ = jax.lax.scan(layer, x, (params["stack"], flags))
    return final_norm(cfg, parent=None).apply({"params": params["out_norm"]}, x)


def make_loss_fn(cfg: LMConfig):
    """The loss of one member, whose parameters include its flags."""

    def loss_fn(params, batch, key):
        del key  # no dropout
        params = dict(params)
        flags = params.pop(FLAGS)
        hidden = hidden_states(cfg, params, flags, batch)
        head = head_kernel(cfg, params)
        sums = cross_entropy(hidden, head, batch.targets, batch.weights)
        return sums.ce_sum, sums

    return loss_fn


def members_of(size: str) -> list[Member]:
    """All members of the grid of one size."""
    every = itertools.product(patterns(SIZES[size].model.num_blocks), RATES[size], SEEDS[size])
    return list(itertools.starmap(Member, every))


def init_states(cfg: ExperimentConfig, members: list[Member], tx) -> TrainState:
    """The initial states of all members, with a leading axis."""
    keys = jnp.stack([jax.random.key(member.seed) for member in members])
    flags = jnp.asarray(np.stack([flags_of(member.pattern) for member in members]))
    scales = jnp.asarray([member.lr / cfg.train.lr for member in members], jnp.float32)

    @jax.jit
    @jax.vmap
    def init(key, flags, scale):
        params = init_params(cfg.model, key) | {FLAGS: flags}
        return first_state(params, tx, scale, freeze=cfg.train.freeze)

    return init(keys, flags, scales)


def train_members(
    cfg: ExperimentConfig, members: list[Member], batches: Callable[[int, int], Batch]
) -> tuple[PyTree, dict[str, float]]:
    """Trains all members in one program; returns their parameters and its times in seconds."""
    tx = make_optimizer(cfg.train)
    states = init_states(cfg, members, tx)
    step = make_train_step(LM(cfg.model), tx, cfg.train, make_loss_fn(cfg.model))
    update = jax.vmap(step, in_axes=(0, None))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(states, batches):
        def body(states, batch):
            states, metrics = update(states, batch)
            return states, metrics["loss"]

        return jax.lax.scan(body, states, batches)

    seconds, count = [], cfg.train.log_every
    for first in range(0, cfg.train.steps - count + 1, count):
        start = time.perf_counter()
        states, loss = run(states, batches(first, count))
        loss = np.asarray(loss).mean(axis=0) / math.log(2)
        seconds.append(time.perf_counter() - start)
        bits, rate = f"{loss.min():.3f} to {loss.max():.3f}", seconds[-1] / count
        print(f"step {first + count:5d}: {bits} bits per byte, {rate:.2f} s per step", flush=True)
    step_seconds = statistics.median(seconds[1:]) / count
    times = {"compile": seconds[0] - count * step_seconds, "step": step_seconds}
    return states.params, times


def stacked_batches(cfg: DataConfig) -> Callable[[int, int], Batch]:
    """(first step, number of steps) -> the training batches of these steps, stacked."""
    windows = load(cfg, "train")

    def batches(first: int, count: int) -> Batch:
        steps = [batch_at(windows, cfg, step) for step in range(first, first + count)]
        return Batch(*map(np.stack, zip(*steps, strict=True)))

    return batches


def valid_batches(cfg: ExperimentConfig) -> Iterator[Batch]:
    """A sample of the validation batches, the same for all members."""
    return eval_batches(load(cfg.data, "valid"), cfg.data, cfg.train.eval_batches)


def checked_patterns(size: str) -> list[str]:
    """The patterns whose ordinary models are compared with the grid: no, half and only s."""
    n = SIZES[size].model.num_blocks
    half = ("ms" * n)[:n]
    return [half] if size == "smoke" else ["m" * n, half, "s" * n]


def difference_to_lm(
    cfg: ExperimentConfig, params: PyTree, members: list[Member], names: list[str]
) -> float:
    """The largest relative difference between the loss of a member and that of its plain `LM`.

    On one validation batch, with the trained parameters of the first member of each pattern.
    """
    batch, worst = next(valid_batches(cfg)), 0.0
    loss_fn = jax.jit(make_loss_fn(cfg.model))
    for pattern in names:
        index = [member.pattern for member in members].index(pattern)
        one = jax.tree.map(lambda leaf, index=index: leaf[index], params)
        plain = params_of({name: one[name] for name in one if name != FLAGS}, pattern)
        model = LM(dataclasses.replace(cfg.model, pattern=pattern))
        sums = jax.jit(functools.partial(token_sums, model, document_resets=True))
        expected = float(sums(plain, batch)[0].ce_sum)
        worst = max(worst, abs(float(loss_fn(one, batch, None)[0]) / expected - 1))
    return worst


def separate_program(cfg: ExperimentConfig, pattern: str, size: str, batches) -> dict[str, float]:
    """Seconds of compilation and of a step of the program of one pattern, without flags."""
    half = TIMED_STEPS // 2
    train = dataclasses.replace(cfg.train, steps=TIMED_STEPS, log_every=half, freeze=None)
    model, marks = LM(dataclasses.replace(cfg.model, pattern=pattern)), [time.perf_counter()]

    def report(step, losses):
        marks.append(time.perf_counter())

    train_grid(model, train, batches, seeds=SEEDS[size], lrs=RATES[size], report=report)
    step = (marks[2] - marks[1]) / half
    return {"compile": marks[1] - marks[0] - half * step, "step": step}


def summarize(cfg: LMConfig, members: list[Member], bits: Float[np.ndarray, "M"]) -> list[dict]:
    """One record for each pattern: bits per byte by learning rate and seed."""
    records = []
    for pattern in dict.fromkeys(member.pattern for member in members):
        by_rate: dict[str, list[float]] = {}
        for member, value in zip(members, bits, strict=True):
            if member.pattern == pattern:
                by_rate.setdefault(f"{member.lr:g}", []).append(float(value))
        best = min(by_rate, key=lambda lr: statistics.fmean(by_rate[lr]))
        model = {"parameters": count_params(dataclasses.replace(cfg, pattern=pattern))}
        losses = {"best_lr": best, "best": statistics.fmean(by_rate[best])}
        records.append({"pattern": pattern, **model, "bits_per_byte": by_rate, **losses})
    return records


def outcome(size: str, records: list[dict], difference: float) -> dict[str, bool]:
    """Whether each expectation holds."""
    checks = {"a member has the loss of an LM with its pattern": difference < 1e-4}
    if size == "cpu":
        name = f"every pattern ends below {LEVEL:g} bits per byte"
        checks[name] = all(record["best"] < LEVEL for record in records)
    return checks


def table(records: list[dict]) -> str:
    """A Markdown table of all patterns."""
    rates = list(records[0]["bits_per_byte"])
    lines = [
        [
            *(one["pattern"], str(one["pattern"].count("s")), f"{one['parameters']:,}"),
            *(", ".join(f"{v:.3f}" for v in one["bits_per_byte"][lr]) for lr in rates),
            f"{one['best']:.3f}",
        ]
        for one in records
    ]
    header = ["pattern", "sLSTM", "parameters", *(f"seeds at {lr}" for lr in rates), "best mean"]
    return measure.table(header, lines)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots the validation loss of every pattern: a color per learning rate, a point per seed."""
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    records, rates = result["patterns"], list(result["patterns"][0]["bits_per_byte"])
    for number, lr in enumerate(rates):
        x = np.arange(len(records)) + 0.16 * (number - (len(rates) - 1) / 2)
        by_seed = np.array([one["bits_per_byte"][lr] for one in records])
        axes.plot(x, by_seed, "o", ms=4, alpha=0.45, color=f"C{number}")
        axes.plot(x, by_seed.mean(axis=1), "_", ms=14, mew=3, color=f"C{number}", label=lr)
    counts = [one["pattern"].count("s") for one in records]
    for n, (before, after) in enumerate(itertools.pairwise(counts)):
        if before != after:
            axes.axvline(n + 0.5, color="0.7", lw=0.8)
    axes.set_xticks(range(len(records)), [one["pattern"] for one in records], rotation=60)
    axes.set_ylabel("validation bits per byte")
    axes.set_xlabel("pattern: m is mLSTM, s is sLSTM, from the first block to the last")
    axes.grid(alpha=0.3, axis="y")
    title = "learning rate (bar: mean of the seeds)"
    figure.legend(title=title, frameon=False, ncols=len(rates), loc="outside upper center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains the grid and writes one JSON file and one plot."""

    size: record.Size = "cpu"
    out: pathlib.Path = record.RESULTS / "placement.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    record.check_size(options.size, SIZES)
    cfg, members = SIZES[options.size], members_of(options.size)
    batches = stacked_batches(cfg.data)
    print(f"{len(members)} members in one program", flush=True)
    params, times = train_members(cfg, members, batches)
    loss_fn = make_loss_fn(cfg.model)
    sums = evaluate_grid(LM(cfg.model), params, valid_batches(cfg), cfg.train, loss_fn)
    bits = np.asarray(sums.ce_sum / sums.weight_sum) / math.log(2)
    records = summarize(cfg.model, members, bits)
    names = checked_patterns(options.size)
    difference = difference_to_lm(cfg, params, members, names)
    separate = {name: separate_program(cfg, name, options.size, batches) for name in names}
    result = record.start("placement", options.size)
    result |= {"config": to_dict(config(options.size)), "members": len(members)}
    result |= {
        "seconds_of_the_grid": times,
        "seconds_of_separate_programs": separate,
        "largest_difference_to_lm": difference,
        "patterns": records,
        "outcome": outcome(options.size, records, difference),
    }
    print(table(records))
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
