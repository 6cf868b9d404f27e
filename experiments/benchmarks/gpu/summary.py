"""All sections in one result file, and a line per row to read."""

import json
import pathlib
import time

from experiments.benchmarks import measure
from experiments.benchmarks.gpu.report import Row

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")
PACKAGES += ("flax", "torch", "mlstm_kernels", "flash-linear-attention")
RATES = ("share", "tokens_per_s", "mfu", "share_of_bandwidth")


def main(folder: pathlib.Path, target: pathlib.Path, start: float) -> int:
    """Writes `target`; 1 if a row is wrong or has an error."""
    files = sorted(folder.glob("*.json"))
    reports = {file.stem: json.loads(file.read_text()) for file in files}
    about = {**measure.about("gpu_run", PACKAGES), "driver": measure.driver()}
    measure.write(target, {**about, "seconds": round(time.time() - start), "sections": reports})
    lines = [line(name, row) for name, rows in reports.items() for row in rows]
    print("\n".join(lines))
    rows = [row for rows in reports.values() for row in rows]
    return int(any("error" in row or not row.get("ok", True) for row in rows))


def line(section: str, row: Row) -> str:
    """Section, name, sizes and result."""
    sizes = str(row.get("sizes") or "")
    return f"{section:14} {row['what'][:62]:62} {sizes:36} {result(row)[:150]}"


def result(row: Row) -> str:
    """What matters of a row."""
    if "error" in row:
        return row["error"]
    if "median_ms" in row:
        rates = (f", {name} {row[name]:.3g}" for name in RATES if row.get(name) is not None)
        return f"{row['median_ms']:.3f} ms" + "".join(rates)
    if "ok" in row:
        # NaN first, then the largest.
        name, error = max(row["errors"].items(), key=lambda pair: (pair[1] != pair[1], pair[1]))
        verdict = "ok" if row["ok"] else f"FAILED {row.get('failed', '')}"
        differ = "" if row.get("same_bits", True) else ", RUNS DIFFER"
        return f"{verdict}, worst {name} {error:.1e}{differ}"
    if "copy_tb_s" in row:
        rates = f"copy {row['copy_tb_s']:.2f} TB/s, products {row['bf16_tflop_s']:.0f} TFLOP/s"
        return f"{rates}, {row['device']}"
    return ""
