"""Collects the records of all sections in one result file and prints one line for each."""

import json
import pathlib
import time

from experiments.benchmarks import measure
from experiments.benchmarks.gpu.report import Record

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")
PACKAGES += ("flax", "torch", "mlstm_kernels", "flash-linear-attention")
RATES = ("share", "tokens_per_s", "mfu", "share_of_bandwidth")


def main(folder: pathlib.Path, target: pathlib.Path, start: float) -> int:
    """Writes `target`; returns 1 if any record has an error or a failed check, else 0."""
    files = sorted(folder.glob("*.json"))
    sections = {file.stem: json.loads(file.read_text()) for file in files}
    info = {**measure.run_info("gpu_run", PACKAGES), "driver": measure.driver()}
    measure.write(target, {**info, "seconds": round(time.time() - start), "sections": sections})
    lines = [line(name, record) for name, records in sections.items() for record in records]
    print("\n".join(lines))
    all_records = [record for records in sections.values() for record in records]
    return int(any("error" in record or not record.get("ok", True) for record in all_records))


def line(section: str, record: Record) -> str:
    """Section, name, sizes and outcome of one record."""
    sizes = str(record.get("sizes") or "")
    return f"{section:14} {record['name'][:62]:62} {sizes:36} {outcome(record)[:150]}"


def outcome(record: Record) -> str:
    """The error, time, worst deviation or device limits of a record, whichever it has."""
    if "error" in record:
        return record["error"]
    if "refused" in record:
        return f"refused: {record['refused']}"
    if "median_ms" in record:
        rates = (f", {name} {record[name]:.3g}" for name in RATES if record.get(name) is not None)
        return f"{record['median_ms']:.3f} ms" + "".join(rates)
    if "ok" in record:
        # NaN sorts first, then the largest error.
        by_size = lambda pair: (pair[1] != pair[1], pair[1])  # noqa: E731
        name, error = max(record["errors"].items(), key=by_size)
        verdict = "ok" if record["ok"] else f"FAILED {record.get('failed', '')}"
        differ = "" if record.get("same_bits", True) else ", RUNS DIFFER"
        return f"{verdict}, worst {name} {error:.1e}{differ}"
    if "copy_tb_s" in record:
        copy = f"copy {record['copy_tb_s']:.2f} TB/s"
        return f"{copy}, products {record['bf16_tflop_s']:.0f} TFLOP/s, {record['device']}"
    return ""
