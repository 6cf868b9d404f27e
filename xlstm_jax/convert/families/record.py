"""What is known about a model family of `transformers`, and what several families share."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.joined import Joined
from xlstm_jax.convert.names import Rule
from xlstm_jax.convert.tensors import Source, check_num_blocks
from xlstm_jax.modules.config import LMConfig

PLAIN = {"embedding_norm": "none", "logit_soft_cap": None, "final_norm_bias": False}
"""Options of models without what most families lack."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its names, and how its configs and weights are read and written."""

    model_type: str  # in config.json
    architecture: str  # class of `transformers`
    letters: str  # of our blocks
    base: str  # name of the part that has the blocks, such as "backbone."
    rules: tuple[Rule, ...]
    # Fields, weights, dtype of activations -> our config, without `tie_embeddings`.
    read: Callable[[Fields, Source, str], LMConfig]
    write: Callable[[LMConfig], dict[str, Any]]  # the fields that only this family has
    # What the family lacks, for an error message -> whether the model does without it.
    demands: Callable[[LMConfig], dict[str, bool]]
    joined: Callable[[LMConfig], tuple[Joined, ...]] = lambda cfg: ()
    ties: bool = True  # `transformers` supports a tied head
    tied_by_default: bool = False
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # to run on a CPU

    @property
    def head(self) -> str:
        """Name of the weight of the head."""
        return next(rule.torch_name for rule in self.rules if rule.path == "lm_head/kernel")


def num_layers(fields: Fields, source: Source) -> int:
    """`num_hidden_layers`, at most the number of blocks in the weights."""
    count = fields.count("num_hidden_layers")
    check_num_blocks(fields, count, source, "num_hidden_layers")
    return count


def sizes(fields: Fields, dtype: str) -> dict[str, Any]:
    """Vocabulary, width and dtype, as arguments of `LMConfig`."""
    dim = fields.size("hidden_size")
    return {"vocab_size": fields.size("vocab_size"), "dim": dim, "dtype": dtype}


def require_silu(fields: Fields) -> None:
    """Rejects other activations than that of our blocks."""
    fields.require_equal("hidden_act", "silu", "our block has no other activation")


def warn_of_training(fields: Fields, name: str) -> None:
    """Logs a rate that only affects training, unless it is 0."""
    if fields.get(name, None) is not None and fields.number(name) != 0:
        logging.getLogger(__name__).warning(
            "%s of %s is ignored: it only affects training, and this library has no such option",
            name,
            fields.where,
        )


def instead_of(expected: Mapping[str, Any], options: Any, name: str = "") -> dict[str, bool]:
    """Demands that options have the expected values; `name` is that of their group."""
    actual = {field: getattr(options, field) for field in expected}
    return {
        f"{name}{field}={actual[field]!r} instead of {value!r}": actual[field] == value
        for field, value in expected.items()
    }


def same_eps(cfg: LMConfig, *kinds: str) -> dict[str, bool]:
    """Demands that norms of the blocks have the epsilon of the final norm."""
    eps = {kind: getattr(cfg, kind).norm_eps for kind in kinds}
    return {
        f"final_norm_eps={cfg.final_norm_eps} different from {kind}.norm_eps={value}": (
            cfg.final_norm_eps == value
        )
        for kind, value in eps.items()
    }
