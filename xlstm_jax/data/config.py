"""Configuration of the data of a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from xlstm_jax.config.fields import check_fields
from xlstm_jax.data.documents.document import SPLITS, Split
from xlstm_jax.data.documents.files import alternatives
from xlstm_jax.data.order import Shuffle
from xlstm_jax.errors import ConfigError, quote

__all__ = ["SPLITS", "DataConfig", "Split"]

Packing = Literal["windows", "first_fit", "best_fit", "pad", "stream"]


def _table() -> Any:
    """A field that is an empty table by default, and no part of the hash."""
    return dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source, tokenizer, sequence length and batch size of the data of a run."""

    source: str = "stdlib"  # a name in `loader.DATASETS`, or a path: of text or of prepared data
    sources: dict[str, str] = _table()  # of a mixture, by name
    weights: dict[str, float] = _table()  # of the sources, by name
    # (step, weights from this step on), in order; before the first one, `weights`.
    weight_schedule: tuple[tuple[int, dict[str, float]], ...] = dataclasses.field(
        default=(), hash=False
    )
    eval_sets: dict[str, str] = _table()  # more validation sets
    seq_len: int = 256  # T: input tokens of a sequence
    batch_size: int = 16  # sequences of one step, over all hosts
    tokenizer: str = "byte"  # or the path of one; prepared data have their own
    seed: int = 0  # any integer, of the shuffle; for synthetic tasks, of the samples themselves
    pattern: str | None = None  # files of a folder, at any depth: *.py; None: what has a reader
    text_field: str = "text"  # of records
    # windows: all tokens, divided; first_fit, best_fit: several documents; pad: one document;
    # stream: sequence b of a step continues that of the step before
    packing: Packing = "windows"
    shuffle: Shuffle = "auto"  # full; blocks: in two levels; auto: full if one set holds all
    shuffle_block: int = 256  # windows that are read together
    shuffle_set: int = 512  # blocks whose windows are mixed; of remote data, these are in memory
    verify: Literal["size", "full", "auto"] = "auto"  # prepared data; full: by SHA-256
    workers: int = 0  # processes that load batches; 0: a thread
    cache_dir: str | None = None  # local copies of remote blocks; None: none
    min_len: int = 3  # synthetic tasks: tokens of the shortest sample, with the answer
    max_len: int | None = None  # synthetic tasks: of the longest; None: seq_len + 1
    num_eval_samples: int = 8192  # synthetic tasks: samples of valid and test
    # Synthetic tasks: options by name, such as vocab_size; see `data.synthetic.registry`.
    task: dict[str, bool | int | float] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"to_json": dict},  # config.json of earlier versions has no such field
    )

    def __post_init__(self):
        demands = {
            "at least 0": "workers",
            "at least 1": "seq_len batch_size num_eval_samples shuffle_block shuffle_set",
            "at least 2": "min_len max_len",  # one symbol and the answer
        }
        check_fields(self, "data.", demands)
        if not self.source:
            raise ConfigError(
                "data.source must be the name of a data set or a path, got ''; use '.' for the "
                "working directory."
            )
        if self.pattern is not None:
            alternatives(self.pattern)  # raises if it is invalid
        self._check_mixture()
        for name in self.eval_sets:
            if not name.isidentifier() or name in ("train", "valid"):
                raise ConfigError(
                    "data.eval_sets must have names of letters, digits and underscores, other "
                    f"than train and valid, got {quote(name)}; metrics are named after them."
                )

    def _check_mixture(self) -> None:
        if not self.sources:
            if self.weights or self.weight_schedule:
                raise ConfigError(
                    "data.weights and data.weight_schedule need data.sources, a table of names "
                    "and paths; data.source has no weight."
                )
            return
        _check_weights("data.weights", self.weights, self.sources)
        steps = [step for step, _ in self.weight_schedule]
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise ConfigError(
                f"data.weight_schedule must have increasing steps from 1 on, got {steps}; "
                "data.weights apply from step 0 on."
            )
        for step, weights in self.weight_schedule:
            _check_weights(f"data.weight_schedule from step {step} on", weights, self.sources)
        if self.packing == "stream":
            raise ConfigError(
                "data.packing='stream' must have one source, got data.sources; "
                "use data.source, or another packing."
            )


def _check_weights(where: str, weights: Mapping[str, float], names: Mapping[str, Any]) -> None:
    """Raises ConfigError unless every source has a valid weight."""
    if set(weights) != set(names):
        raise ConfigError(
            f"{where} must have a weight for each of {', '.join(names)}, got "
            f"{quote(dict(weights))}; a weight of 0 leaves a source out."
        )
    total = sum(weights.values())
    if not all(weight == 0 or weight >= 1e-5 * total for weight in weights.values()) or not total:
        raise ConfigError(
            f"{where} must be 0, or at least 1e-5 of their sum, and not all 0, got "
            f"{quote(dict(weights))}; leave rare sources out."
        )
