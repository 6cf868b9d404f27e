"""The results of a sweep, collected in one table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_jax.config import ConfigError, read_json
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.scaling.status import RESULT, RunStatus, status
from xlstm_jax.train import rundir

PLAN, TABLE = "plan.json", "table.csv"
MAX_NAMED = 3
"""Runs that an error message names."""


class Table(NamedTuple):
    """The results of a sweep."""

    records: list[dict[str, Any]]  # of finished runs, in the order of the plan
    unfinished: list[RunStatus]

    def csv(self) -> str:
        """The records as comma-separated values with a header."""
        text = io.StringIO()
        columns = dict.fromkeys(name for record in self.records for name in record)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


def collect(out: str | Path, *, allow_mixed: bool = False) -> Table:
    """The results of a sweep as one table, also written to `out`/table.csv.

    Args:
        allow_mixed: accept results of different sources of this library; the column `source` tells
            them apart.

    Raises:
        ConfigError: `out` is not a sweep, or has results of another plan, copies of results, or
            results of different sources.
    """
    out = rundir.expand(out)
    if not (out / PLAN).is_file():
        raise ConfigError(f"{quote_path(out)} has no {PLAN} of a sweep; run it first.")
    planned = {one["run_id"]: one["name"] for one in read_json(out / PLAN)["runs"]}
    results = results_of(out)
    if strays := [name for name in results if name not in planned]:
        raise ConfigError(
            f"{quote_path(out)} has {len(strays)} results of another plan ({listed(strays)}); "
            "move them elsewhere, or run the sweep that planned them."
        )
    if not allow_mixed:
        _refuse_mixed(out, results)
    # `versions` is a table of its own.
    records = [
        {name: x for name, x in results[i].items() if name not in ("versions", "name")}
        for i in planned
        if i in results
    ]
    unfinished = [status(out / i, planned[i]) for i in planned if i not in results]
    table = Table(records, unfinished)
    rundir.write(out / TABLE, table.csv().encode())
    return table


def results_of(out: Path) -> dict[str, dict[str, Any]]:
    """The result of every finished run, by id; raises ConfigError if one is in another's folder."""
    results = {}
    for path in sorted(out.glob(f"*/{RESULT}")):
        result = read_json(path)
        if result.get("run_id") != path.parent.name:
            raise ConfigError(
                f"{quote_path(path)} must be the result of the run {path.parent.name}, but has the "
                f"id {quote(result.get('run_id'))}: a duplicate; delete the copy."
            )
        results[path.parent.name] = result
    return results


def _refuse_mixed(out: Path, results: dict[str, dict[str, Any]]) -> None:
    sources: dict[str, list[str]] = {}
    for name, result in results.items():
        sources.setdefault(result["source"], []).append(name)
    if len(sources) > 1:
        groups = "; ".join(f"{x}: {len(n)} runs ({listed(n)})" for x, n in sources.items())
        raise ConfigError(
            f"{quote_path(out)} has results of {len(sources)} sources of xlstm_jax ({groups}); "
            "delete the folders of one and run the sweep again, or pass allow_mixed=True "
            "(--allow-mixed)."
        )


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
