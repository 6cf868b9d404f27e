"""Tables of `xlstm-jax evaluate`: one column per model, or fields for a single one."""

from collections.abc import Mapping, Sequence
from typing import Any

from xlstm_jax.cli import console
from xlstm_jax.evaluate.domains import mean_loss
from xlstm_jax.evaluate.position import Bucket
from xlstm_jax.evaluate.results import Evaluation, label_of, short_names


def show(evaluations: Sequence[Evaluation], wins: Sequence[Mapping[str, Any]]) -> None:
    """Prints everything that was measured."""
    names = short_names([e.model for e in evaluations])
    tables = [
        *([_perplexity] if evaluations[0].perplexity else []),
        *([_positions] if evaluations[0].by_position else []),
        *([_frequencies] if evaluations[0].by_frequency else []),
        *([_domains] if evaluations[0].domains else []),
        *([_tasks] if evaluations[0].tasks else []),
    ]
    for number, table in enumerate(tables):
        if number:
            console.write("\n")
        table(evaluations, names)
        if table is _domains:
            _wins(dict(zip([e.model for e in evaluations], names, strict=True)), wins)


def _perplexity(evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    fields = [_fields(evaluation) for evaluation in evaluations]
    if len(fields) == 1:
        console.print_fields(fields[0])
        return
    data = list(dict.fromkeys(one.pop("data") for one in fields))
    console.print_fields({"data": "; ".join(data)})
    console.write("\n")
    header = list(dict.fromkeys(name for one in fields for name in one))
    lines = [
        [name, *(one.get(field, "-") for field in header)]
        for name, one in zip(names, fields, strict=True)
    ]
    console.print_table(["model", *header], lines)


def _fields(evaluation: Evaluation) -> dict[str, str]:
    result = evaluation.perplexity
    assert result is not None and evaluation.data is not None
    fields = {"data": evaluation.data}
    if result.bits_per_byte is not None:
        fields["bits per byte"] = f"{result.bits_per_byte:.4f}"
    fields["nats per token"] = f"{result.nats_per_token:.4f}"
    # Beyond 700 nats the exponential overflows.
    fields["perplexity"] = f"{result.perplexity:.4f}"
    fields["tokens"] = f"{result.num_tokens:,}"
    return fields


def _positions(evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    buckets = [evaluation.by_position for evaluation in evaluations]
    _buckets("position", buckets, names)


def _frequencies(evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    buckets = [evaluation.by_frequency for evaluation in evaluations]
    _buckets("count in training", buckets, names)


def _buckets(
    what: str,
    models: Sequence[Sequence[Bucket]],
    names: Sequence[str],
) -> None:
    """Nats per token and tokens of every bucket; tokens once if all models have the same."""
    is_single = len(models) == 1
    losses = ["nats per token"] if is_single else [f"{name}, nats per token" for name in names]
    counts = [[f"{bucket.num_tokens:,}" for bucket in buckets] for buckets in models]
    same = all(column == counts[0] for column in counts)
    counts, titles = (counts[:1], ["tokens"]) if same else (counts, [f"{n}, tokens" for n in names])
    lines = [
        [
            label_of(buckets[0]),
            *(_loss(bucket) for bucket in buckets),
            *(c[i] for c in counts),
        ]
        for i, buckets in enumerate(zip(*models, strict=True))
    ]
    console.print_table([what, *losses, *titles], lines)


def _loss(bucket: Bucket) -> str:
    return f"{bucket.nats_per_token:.4f}" if bucket.num_tokens else "-"


def _domains(evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    is_single = len(evaluations) == 1
    header = ["bits per byte"] if is_single else [f"{name}, bits per byte" for name in names]
    means = [mean_loss(evaluation.domains) for evaluation in evaluations]
    first = evaluations[0].domains
    lines = [
        [
            domain,
            *(f"{e.domains[domain].bits_per_byte:.4f}" for e in evaluations),
            f"{first[domain].num_bytes:,}",
            f"{first[domain].num_documents:,}",
        ]
        for domain in first
    ]
    lines.append(
        [
            "all",
            *(f"{mean.bits_per_byte:.4f}" for mean in means),
            f"{means[0].num_bytes:,}",
            f"{means[0].num_documents:,}",
        ]
    )
    console.print_table(["domain", *header, "bytes", "documents"], lines)


def _wins(short: Mapping[str, str], wins: Sequence[Mapping[str, Any]]) -> None:
    for comparison in wins:
        num_losses = comparison["num_domains"] - comparison["num_wins"] - comparison["num_ties"]
        console.write(
            f"\n{short[comparison['model']]} has the lower loss in {comparison['num_wins']:,} of "
            f"{comparison['num_domains']:,} domains, {short[comparison['over']]} in "
            f"{num_losses:,}.\n"
        )


def _tasks(evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    header = ["value"] if len(evaluations) == 1 else names
    lines = [
        [task, metric, *(_value(e.tasks.get(task, {}), metric) for e in evaluations)]
        for task, metrics in evaluations[0].tasks.items()
        for metric in metrics
        if "_stderr" not in metric and metric not in ("num_fewshot", "num_documents")
    ]
    console.print_table(["task", "metric", *header], lines or [["-"] * (2 + len(header))])


def _value(metrics: Mapping[str, Any], metric: str) -> str:
    """A metric, with its standard error if it has one."""
    if metric not in metrics:
        return "-"
    name, comma, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
