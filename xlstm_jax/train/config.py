"""Configuration of training and of a complete run."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from xlstm_jax.config.fields import check_fields, check_range
from xlstm_jax.data.batch import Examples
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.data.config import DataConfig
from xlstm_jax.errors import ConfigError, quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.sharding.mesh import MeshConfig
from xlstm_jax.sharding.rules import Rules

Schedule = Literal["constant", "linear", "cosine", "exponential", "wsd"]
OptimizerName = Literal[
    "adamw",
    "adam",
    "nadamw",
    "lion",
    "adafactor",
    "lamb",
    "sgd",
    "ademamix",
    "adopt",
    "schedule_free_adamw",
    "muon",
]
Watch = Literal["none", "gates", "params", "all"]
WriterName = Literal["tensorboard", "wandb", "trackio"]


class Parts(NamedTuple):
    """Numbers of steps of the parts of a schedule, in order; only "wsd" has a constant part."""

    warmup: int
    constant: int
    decay: int
    cooldown: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, schedule, guard, and the intervals of logging, evaluation and checkpoints.

    A number of steps below 1 is a fraction of `steps`.
    """

    steps: int = 1000  # total updates: warm-up, main part and cool-down
    lr: float = 1e-3  # peak learning rate
    schedule: Schedule = "cosine"  # shape of the main part
    warmup_steps: int | float = 0.05  # linear, from 0
    decay_steps: int | float = 0.2  # "wsd" only: linear decay at the end of the main part
    end_factor: float = 0.1  # the main part ends at end_factor * lr; unused by "constant"
    cooldown_steps: int | float = 0  # linear, from the end of the main part to cooldown_lr
    cooldown_lr: float = 0.0
    optimizer: OptimizerName = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9  # "sgd" and "muon" only
    weight_decay: float = 0.1
    decay_pattern: str = r"(^|/)kernel$"  # regex over paths of the parameters that decay
    lr_factors: tuple[tuple[str, float], ...] = ()  # (regex over paths, factor on lr)
    freeze: str | None = None  # regex over paths of the parameters that are not trained
    ema_decay: float = 0.0  # of an average of the parameters, saved beside them; 0: none
    grad_clip: float | None = 0.5  # bound on the global norm of the gradient
    accumulation: int = 1  # micro-batches per update
    # (step, share of data.batch_size from this step on), from step 0 on; (): all of it always
    batch_ramp: tuple[tuple[int, float], ...] = ()
    document_resets: bool = True  # a document starts from the initial state
    carry_state: bool = False  # truncated backpropagation through time; needs packing="stream"
    z_loss: float = 0.0  # weight of the squared log-normalizer of the softmax; 1e-4 is usual
    loss_chunk: int | None = None  # tokens whose logits are in memory at once; None: the op chooses
    guard_factor: float = 10.0  # skip an update if its gradient norm exceeds this times the average
    guard_floor: float = 10.0  # ... and exceeds this
    max_consecutive_skips: int = 8  # consecutive skipped updates after which the run ends
    spike_rewinds: int = 0  # times a run returns to a checkpoint and skips the data of a spike
    seed: int = 0  # any integer; of parameters and dropout; data.seed orders the data
    log_every: int = 10  # steps
    eval_every: int = 200  # steps; 0: never, not even at the end
    eval_batches: int | None = 20  # batches per evaluation, spread over the split; None: all
    checkpoint_every: int = 200  # steps; 0: only by checkpoint_minutes and at the end
    checkpoint_minutes: float = 10.0  # 0: only by checkpoint_every
    keep: int = 3  # number of newest checkpoints to retain
    export_every: int = 0  # checkpoints between exports in the layout of transformers; 0: none
    watch: Watch = "gates"  # statistics of gates, of parameters and gradients, or of both
    watch_every: int = 100  # steps
    writers: tuple[WriterName, ...] = ()  # of records, besides metrics.jsonl
    profile: str | None = None  # steps to trace, such as "10:15": those after 10 steps, up to 15

    def __post_init__(self):
        check_fields(self, "train.", _DEMANDS)
        for name in ("warmup_steps", "decay_steps", "cooldown_steps"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ConfigError(
                    f"train.{name} must be an integer number of steps or a fraction below 1, got "
                    f"{value}; 0 leaves this part out."
                )
        if self.parts.constant < 0:
            names = ["warmup", "cooldown"] + (["decay"] if self.schedule == "wsd" else [])
            words = " + ".join(f"{name}_steps {getattr(self.parts, name)}" for name in names)
            raise ConfigError(
                f"train.steps must cover all parts of its schedule, got {self.steps} for {words}; "
                "make it larger or a part shorter."
            )
        _ = self.profile_steps  # checks it
        check_regex("train.decay_pattern", self.decay_pattern)
        check_regex("train.freeze", self.freeze)
        for pattern, factor in self.lr_factors:
            check_regex("train.lr_factors", pattern)
            check_range("train.lr_factors", factor, "at least 0")

    @property
    def parts(self) -> Parts:
        """Numbers of steps of warm-up, main part (constant and decay) and cool-down."""

        def count(length: int | float) -> int:
            return round(length * self.steps) if length < 1 else int(length)

        warmup, cooldown = count(self.warmup_steps), count(self.cooldown_steps)
        main = self.steps - warmup - cooldown
        # Negative if the parts exceed `steps`, which shows as a negative constant part.
        decay = count(self.decay_steps) if self.schedule == "wsd" else max(main, 0)
        return Parts(warmup, main - decay, decay, cooldown)

    @property
    def profile_steps(self) -> range | None:
        """Numbers of steps done before each step that is traced; None: no step is."""
        if self.profile is None:
            return None
        bounds = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.profile, re.ASCII)
        steps = range(*map(int, bounds.groups())) if bounds else range(0)
        if not steps or steps.stop > self.steps:
            raise ConfigError(
                "train.profile must be two increasing numbers of steps up to train.steps="
                f"{self.steps}, got {quote(self.profile)}; write for example '10:15', to trace "
                "from step 10 to step 15."
            )
        return steps


def check_regex(name: str, pattern: str | None) -> None:
    """Raises ConfigError unless a pattern, if any, is a regular expression."""
    try:
        re.compile(pattern or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name} must be a regular expression, got {quote(pattern)} ({error}); use "
            "'/kernel$' for weight matrices or '$^' for none."
        ) from error


_DEMANDS = {
    "at least 1": "steps accumulation loss_chunk max_consecutive_skips log_every eval_batches keep "
    "watch_every",
    "at least 0": "warmup_steps decay_steps cooldown_steps cooldown_lr weight_decay z_loss "
    "guard_floor eval_every checkpoint_every checkpoint_minutes spike_rewinds export_every",
    "above 0": "lr eps grad_clip",
    "above 1": "guard_factor",
    "above 0 and at most 1": "end_factor",
    "at least 0 and below 1": "b1 b2 momentum ema_decay",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: kernel + alpha / rank * A B, with trainable A and B.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = 0  # 0: none, all parameters are trained
    alpha: float = 16.0
    target: str = r"kernel$"  # regex over paths of the parameters that get adapters

    def __post_init__(self):
        check_fields(self, "lora.", {"at least 0": "rank", "above 0": "alpha"})
        check_regex("lora.target", self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The complete configuration of a run, sufficient to reproduce it."""

    name: str
    model: LMConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    init_from: str | None = None  # a run, a folder of transformers or hf://: initial parameters
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        check_fields(self, "", {})
        for size in self.batch_sizes.distinct:
            if size % self.train.accumulation:
                raise ConfigError(
                    "data.batch_size must be a multiple of train.accumulation, got "
                    f"{size} and {self.train.accumulation}; change one of them, or "
                    "train.batch_ramp."
                )
        for letter in dict.fromkeys(self.model.pattern):
            limit = getattr(self.model.options_of(letter), "max_length", None)
            if limit is not None and limit < self.data.seq_len:
                name = f"model.{BLOCKS[letter].name}"
                raise ConfigError(
                    f"{name}.cache_size must be at least data.seq_len={self.data.seq_len}, so that "
                    f"a query sees the full sequence, got {limit}; set it, or {name}.window."
                )
        if self.train.carry_state and self.data.packing != "stream":
            raise ConfigError(
                "train.carry_state must be False unless data.packing='stream', where sequences "
                f"continue from step to step, got data.packing={quote(self.data.packing)}; use "
                "that packing."
            )
        if self.train.carry_state and self.train.batch_ramp:
            raise ConfigError(
                "train.batch_ramp must be empty with train.carry_state, which needs the same "
                f"sequences in every step, got {quote(self.train.batch_ramp)}; leave it out."
            )
        if self.train.freeze is not None and self.lora.rank:
            raise ConfigError(
                f"train.freeze={quote(self.train.freeze)} must be None with lora.rank="
                f"{self.lora.rank}, which trains adapters only; choose them by lora.target."
            )

    @functools.cached_property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of every step."""
        return BatchSizes(self.data.batch_size, self.train.batch_ramp)

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Renames old fields and values of a config.json; called by `from_dict`."""
        values = dict(values)
        if isinstance(mesh := values.get("mesh"), dict):
            values["mesh"] = {_OLD_MESH.get(name, name): value for name, value in mesh.items()}
        if isinstance(model := values.get("model"), dict):
            values["model"] = model | {
                kind: options | {"implementation": "recurrent"}
                for kind, options in model.items()
                if kind in ("slstm", "lstm") and isinstance(options, dict)
                if options.get("implementation") == "scan"
            }
        return values


# Old -> new names of fields of `MeshConfig`.
_OLD_MESH = {"smallest_cut": "min_shard_size", "slstm_time": "slstm_seq"}


def check_vocabulary(cfg: ExperimentConfig, examples: Examples) -> None:
    """Raises ConfigError unless the vocabulary of the model covers the token ids of the data."""
    if examples.vocab_size == 0:
        raise ConfigError(
            f"data.source={quote(cfg.data.source)} has vectors instead of tokens, which a language "
            "model cannot read; use a model of modules.heads with the train step, as its "
            "experiment does."
        )
    if cfg.model.vocab_size < examples.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be at least {examples.vocab_size}, which the token ids of "
            f"data.source={quote(cfg.data.source)} need, got {cfg.model.vocab_size}; make it "
            "larger."
        )


def check_divisibility(cfg: ExperimentConfig, rules: Rules, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError unless the mesh axes divide the batch, the sequence and the heads."""
    accumulation = cfg.train.accumulation
    batch = "data.batch_size" if accumulation == 1 else "data.batch_size / accumulation"
    blocks = {letter: cfg.model.options_of(letter) for letter in cfg.model.pattern}
    lengths = [
        *(("batch", batch, size // accumulation) for size in sorted(cfg.batch_sizes.distinct)),
        ("time", "data.seq_len", cfg.data.seq_len),
    ]
    lengths += [
        ("heads", f"model.{BLOCKS[letter].name}.{field}", length)
        for letter, options in blocks.items()
        for field in ("num_heads", "num_kv_heads", "num_qk_heads", "groups")
        # A single head that others share is replicated.
        if (length := getattr(options, field, None)) and (length > 1 or field == "num_heads")
    ]
    for name, field, length in lengths:
        num_shards = math.prod(sizes[axis] for axis in rules[name])
        if length % num_shards:
            axes = " x ".join(f"{axis}={sizes[axis]}" for axis in rules[name])
            multiple = length // num_shards
            near = {max(1, multiple) * num_shards, (multiple + 1) * num_shards}
            raise ConfigError(
                f"{field} must be a multiple of {num_shards}, the devices along {axes}, got "
                f"{length}; use {' or '.join(map(str, sorted(near)))}, or another mesh."
            )
    shards_time = math.prod(sizes[axis] for axis in rules["time"]) > 1
    unsharded = [x for x, opts in blocks.items() if not getattr(opts, "sharded_over_time", True)]
    if shards_time and unsharded and cfg.mesh.slstm_seq == "refuse":
        raise ConfigError(
            f"mesh.seq={sizes['seq']} cannot shard the sequence in blocks {', '.join(unsharded)} "
            f"of model.pattern={quote(cfg.model.pattern)}; use mesh.slstm_seq='gather' to compute "
            "them on every device, or seq=1."
        )
