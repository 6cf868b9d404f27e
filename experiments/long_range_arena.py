"""Which accuracy does a classifier of xLSTM blocks reach on the Long Range Arena?

    python experiments/long_range_arena.py --size cpu                          # small ListOps
    python experiments/long_range_arena.py --size paper --task retrieval --data FOLDER

The size cpu generates ListOps expressions of at most 64 tokens and lists within at most 3 lists.
Expected: xLSTM[1:0] has a test accuracy above 0.4, four times chance, and at least 0.1 above that
of answering the most frequent value of the outermost operator.

The size paper reads the published files from the folder `--data`, which this script never
downloads. Settings, and published accuracies of xLSTM, are in `PAPER`; xLSTM is [0:1] for images
and [1:0] elsewhere. Learning rates: 1e-3, 6e-4 and 1e-4, with warm-up and cosine; the paper's other
schedule, with three restarts, is left out. Settings that it takes from S5 and LRU but does not
print (dropout, augmentation, warm-up) are ours.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.3; Tay et al. 2020, arXiv:2011.04006. The
head is linear, on the mean of the hidden states; for Retrieval it compares two documents. The
command `xlstm-jax train` trains a language model to predict the value of generated expressions
instead, as the token after them.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import record
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch, DataConfig
from xlstm_jax.data.config import Split
from xlstm_jax.data.lra import images, text
from xlstm_jax.data.lra.labeled import labeled_batch
from xlstm_jax.data.synthetic import listops
from xlstm_jax.data.synthetic.samples import sample_keys
from xlstm_jax.modules import LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

Task = Literal["listops", "retrieval", "pathfinder", "gray", "rgb"]


class Setting(NamedTuple):
    """The published settings of a task, its head, and test accuracies."""

    pattern: str
    dim: int
    batch_size: int
    steps: int
    seq_len: int
    num_classes: int
    published: dict[str, float | None]  # None: fails
    vocab_size: int = 1
    in_dim: int | None = None  # numbers per pixel; None: tokens
    num_documents: int = 1


MODELS = ("xLSTM", "Llama", "Mamba", "RWKV-4", "LSTM", "LSTM (Block)")


def _published(*accuracies: float | None) -> dict[str, float | None]:
    return dict(zip(MODELS, accuracies, strict=True))


PAPER: dict[str, Setting] = {
    "retrieval": Setting(
        *("m" * 6, 128, 64, 100_000, 2 * text.DOCUMENT_LEN, 2),
        _published(0.906, 0.845, 0.902, 0.898, None, 0.880),
        vocab_size=257,
        num_documents=2,
    ),
    "listops": Setting(
        *("m" * 8, 128, 32, 80_000, text.LISTOPS_LEN, 10),
        _published(0.411, 0.379, 0.325, 0.389, 0.275, 0.495),
        vocab_size=listops.VOCAB_SIZE,
    ),
    "pathfinder": Setting(
        *("m" * 6, 192, 64, 500_000, 1024, 2),
        _published(0.919, 0.887, 0.992, 0.914, None, None),
        in_dim=1,
    ),
    "gray": Setting(
        *("s" * 6, 512, 64, 180_000, 1024, 10),
        _published(0.695, 0.541, 0.689, 0.691, 0.675, 0.690),
        in_dim=1,
    ),
    "rgb": Setting(
        *("s" * 6, 512, 64, 180_000, 1024, 10),
        _published(0.761, 0.629, 0.765, 0.757, 0.718, 0.756),
        in_dim=3,
    ),
}
"""Task -> blocks, width, batch size, steps, length, classes and accuracies of table 6."""

SMALL = PAPER["listops"]._replace(pattern="mm", dim=32, batch_size=64, steps=1500, seq_len=64)
LRS = {"smoke": (1e-2,), "cpu": (1e-2,), "paper": (1e-3, 6e-4, 1e-4)}
NUM_SEEDS = {"smoke": 1, "cpu": 2, "paper": 1}
SHORT_LISTS: dict[str, Any] = dict(min_len=8, task={"max_depth": 3, "max_args": 5})
LONG_LISTS: dict[str, Any] = dict(min_len=500, task={"max_depth": 10, "max_args": 10})


def make_config(setting: Setting, data: dict[str, Any], **train: Any) -> ExperimentConfig:
    """Blocks, data and training of a setting; `data` has the fields of generated expressions."""
    shared: dict[str, Any] = dict(lr=LRS["paper"][0], warmup_steps=0.1, end_factor=0.01)
    return ExperimentConfig(
        name="long_range_arena",
        model=LMConfig(
            vocab_size=setting.vocab_size,
            dim=setting.dim,
            pattern=setting.pattern,
            mlstm=MLSTMConfig(num_heads=4),
            slstm=SLSTMConfig(num_heads=4),
            embedding_std=1.0,  # of tokens; learns in fewer steps than with small embeddings
        ),
        data=DataConfig(seq_len=setting.seq_len, batch_size=setting.batch_size, seed=1, **data),
        train=TrainConfig(steps=setting.steps, grad_clip=1.0, **shared | train),
    )


SIZES = {
    "smoke": make_config(
        SMALL._replace(dim=16, batch_size=8, steps=20, seq_len=24),
        SHORT_LISTS | {"source": "listops", "num_eval_samples": 64},
        log_every=10,
    ),
    "cpu": make_config(
        SMALL,
        SHORT_LISTS | {"source": "listops", "num_eval_samples": 4096},
        lr=LRS["cpu"][0],
        log_every=100,
    ),
    "paper": make_config(
        PAPER["listops"],
        LONG_LISTS | {"source": "listops", "num_eval_samples": 2000},
        log_every=100,
    ),
}


def config(size: str = "cpu") -> ExperimentConfig:
    """The config of ListOps at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


@dataclasses.dataclass(frozen=True)
class Generated:
    """Generated ListOps expressions with their values as classes."""

    cfg: DataConfig
    split: Split

    shuffle = False
    vocab_size = listops.VOCAB_SIZE

    @property
    def description(self) -> dict[str, Any]:
        """What determines the expressions."""
        return {"source": "listops", "seed": self.cfg.seed, "split": self.split}

    def __len__(self) -> int:
        """Expressions of the splits valid and test; training has new ones in every step."""
        return self.cfg.num_eval_samples

    def batch(self, index: np.ndarray) -> Batch:
        """The expressions with these indices."""
        keys = sample_keys(self.cfg.seed, self.split, index)
        options: dict[str, Any] = self.cfg.task
        drawn = listops.expressions(keys, self.cfg.min_len, self.cfg.seq_len, **options)
        segment_ids = (np.arange(self.cfg.seq_len) < drawn.lengths[:, None]).astype(np.int32)
        return labeled_batch(drawn.tokens.astype(np.int32), segment_ids, drawn.values, index)


def open_set(task: str, cfg: DataConfig, split: Split, folder: pathlib.Path | None) -> Any:
    """A split of a task: from files in a folder, or generated for ListOps without one.

    Raises:
        ConfigError: no folder is given, or a file is missing or invalid.
    """
    if folder is None:
        if task == "listops":
            return Generated(cfg, split)
        raise ConfigError(
            f"data must be the folder with the files of task={task!r}, got None; pass --data "
            "FOLDER. Only listops can be generated."
        )
    if task == "listops":
        return text.read_listops(folder, split, cfg.seq_len)
    if task == "retrieval":
        return text.read_retrieval(folder, split, cfg.seq_len // 2)
    if task == "pathfinder":
        return images.read_pathfinder(folder, split)
    return images.read_cifar10(folder, split, gray=task == "gray")


def split_batches(examples: Any, cfg: DataConfig) -> Iterator[Batch]:
    """All sequences of a split, once."""
    from xlstm_jax.data import eval_batches

    return eval_batches(examples, cfg)


def best_constant(batches: Iterator[Batch]) -> float:
    """Accuracy of answering, for every operator of the outermost list, its most frequent value."""
    counts = np.zeros((4, listops.NUM_CLASSES))
    for batch in batches:
        operator = np.clip(batch.inputs[:, 0] - listops.OPERATOR, 0, 3)
        is_real = batch.weights.sum(axis=1) > 0
        np.add.at(counts, (operator[is_real], batch.targets.max(axis=1)[is_real]), 1)
    return float(counts.max(axis=1).sum() / counts.sum())


def run(cfg: ExperimentConfig, setting: Setting, options: "Options") -> dict[str, Any]:
    """Trains all seeds and learning rates; returns accuracies, the best by the validation split."""
    import jax

    from xlstm_jax.modules.heads import Classifier
    from xlstm_jax.train.grid import batches_of, evaluate_grid, train_grid
    from xlstm_jax.train.head_losses import classification_loss

    model = Classifier(
        cfg.model,
        setting.num_classes,
        in_dim=setting.in_dim,
        num_documents=setting.num_documents,
    )
    loss_fn = functools.partial(classification_loss, model)
    sets = {
        split: open_set(options.task, cfg.data, split, options.data)
        for split in ("train", "valid", "test")
    }
    start = time.perf_counter()
    grid = train_grid(
        model,
        cfg.train,
        batches_of(sets["train"], cfg.data),
        seeds=range(NUM_SEEDS[options.size]),
        lrs=LRS[options.size],
        loss_fn=loss_fn,
        report=record.print_loss,
    )
    accuracy = {}
    for split in ("valid", "test"):
        batches = split_batches(sets[split], cfg.data)
        sums = evaluate_grid(model, grid.params, batches, cfg.train, loss_fn)
        accuracy[split] = (sums.correct_sum / sums.weight_sum).tolist()
    best = int(np.argmax(accuracy["valid"]))
    print(f"  accuracy {accuracy}", flush=True)
    constant = None
    if options.task == "listops":
        constant = best_constant(split_batches(sets["test"], cfg.data))
    return {
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(grid.params)),
        "seeds": grid.seeds,
        "learning_rates": grid.lrs,
        "accuracy": accuracy,
        "test_accuracy": accuracy["test"][best],
        "best_constant": constant,
        "loss_curve": grid.losses[:: max(1, len(grid.losses) // 100)].round(4).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def outcome(result: dict[str, Any], setting: Setting, size: str) -> dict[str, bool]:
    """Whether each expectation holds."""
    accuracy = result["test_accuracy"]
    if size == "paper":
        published = setting.published["xLSTM"] or 0.0
        return {f"accuracy within 0.02 of the published {published}": accuracy > published - 0.02}
    return {
        "accuracy above 0.4": accuracy > 0.4,
        "accuracy at least 0.1 above the best constant of each operator": accuracy
        >= result["best_constant"] + 0.1,
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Training loss, and test accuracies, with chance and the published ones."""
    plt = record.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    curve = np.array(result["loss_curve"])
    left.plot(np.linspace(0, result["steps"], len(curve)), curve, lw=1)
    left.set(xlabel="step", ylabel="loss in nats", title="training, a line per run")
    bars = {"xLSTM, here": result["test_accuracy"], "chance": result["chance"]}
    if result["best_constant"] is not None:
        bars["constant per operator"] = result["best_constant"]
    if result["size"] == "paper":
        bars |= {f"{k}, paper": v for k, v in result["published"].items() if v is not None}
    right.barh(list(bars), list(bars.values()), color=["C0", *["0.7"] * (len(bars) - 1)])
    right.bar_label(right.containers[0], fmt="%.3f", padding=2)
    right.set(xlabel="accuracy", xlim=(0, 1.1), title="test set")
    right.invert_yaxis()
    figure.suptitle(f"Long Range Arena: {result['task']}, length up to {result['length']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains one task and writes one JSON file and one plot."""

    size: record.Size = "cpu"
    task: Task = "listops"
    data: pathlib.Path | None = None  # folder of the files; None: ListOps is generated
    out: pathlib.Path | None = None  # the JSON file; the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1.

    Raises:
        ConfigError: a task other than ListOps is not at the size paper, or has no data.
    """
    cpu.prepare()
    if options.size != "paper" and (options.task != "listops" or options.data is not None):
        raise ConfigError(
            f"task={options.task!r} must be 'listops', without data, at size={options.size!r}; "
            "use --size paper for the published files."
        )
    setting = PAPER[options.task] if options.size == "paper" else SMALL
    cfg = config(options.size)
    if options.task != "listops":
        cfg = make_config(setting, {}, log_every=100)
    result = record.start("long_range_arena", options.size)
    result |= run(cfg, setting, options)
    result |= {
        "task": options.task,
        "length": cfg.data.seq_len,
        "steps": cfg.train.steps,
        "chance": 1 / setting.num_classes,
        "published": setting.published,
    }
    result["outcome"] = outcome(result, setting, options.size)
    suffix = "" if options.size != "paper" else f"_{options.task}"
    return record.save(
        result, options.out or record.RESULTS / f"long_range_arena{suffix}.json", plot
    )


if __name__ == "__main__":
    record.run(main, Options, __doc__)
