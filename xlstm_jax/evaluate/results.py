"""Results of the evaluation of a model, for tables, plots and JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xlstm_jax.evaluate.domains import Domain
from xlstm_jax.evaluate.perplexity import Perplexity
from xlstm_jax.evaluate.position import Bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of one model; what was not measured is None or empty."""

    model: str  # as the user names it
    num_params: int
    data: str | None = None  # what `perplexity` and the buckets are about
    perplexity: Perplexity | None = None
    by_position: Sequence[Bucket] = ()
    by_frequency: Sequence[Bucket] = ()
    domains: Mapping[str, Domain] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields, those of `perplexity` among them, as JSON values."""
        values: dict[str, Any] = {"model": self.model, "num_params": self.num_params}
        if self.perplexity is not None:
            values |= {"data": self.data} | self.perplexity._asdict()
            values["perplexity"] = self.perplexity.perplexity
        for name in ("by_position", "by_frequency"):
            if buckets := getattr(self, name):
                values[name] = [bucket._asdict() for bucket in buckets]
        if self.domains:
            values["domains"] = {name: d._asdict() for name, d in self.domains.items()}
        if self.tasks:
            values["tasks"] = {name: dict(metrics) for name, metrics in self.tasks.items()}
        return values


def label_of(bucket: Bucket) -> str:
    """The range of a bucket."""
    if bucket.stop is None:
        return f"{bucket.start:,} or more"
    if bucket.stop == bucket.start + 1:
        return f"{bucket.start:,}"
    return f"{bucket.start:,}-{bucket.stop - 1:,}"


def short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where that is not unique."""
    last = [source.rstrip("/").rpartition("/")[2] or source for source in sources]
    return [
        name if last.count(name) == 1 else source
        for name, source in zip(last, sources, strict=True)
    ]
