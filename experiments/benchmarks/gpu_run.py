"""Runs one section of the GPU run or writes its summary; `gpu_run.sh` runs all sections.

    python -m experiments.benchmarks.gpu_run SECTION [PART PARTS]
    python -m experiments.benchmarks.gpu_run summary RESULT.json

The environment variable GPU_RUN_SMOKE=1 selects toy sizes and implementations that run on a CPU.
Reports and locks are stored in GPU_RUN_DIR, by default `.gpu_run/work`.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time

SMOKE = bool(os.environ.get("GPU_RUN_SMOKE"))
FOLDER = pathlib.Path(os.environ.get("GPU_RUN_DIR", ".gpu_run/work"))
START = float(os.environ.get("GPU_RUN_START", time.time()))


def patch_triton() -> None:
    """Defines a constant of Triton's driver that jax-triton 0.4 imports and Triton 3.6 lacks.

    Without it the import fails and jax-triton treats the CUDA backend as missing.
    """
    with contextlib.suppress(ImportError):
        import triton.backends.nvidia.driver as driver

        if not hasattr(driver, "TMA_TF32"):
            driver.TMA_TF32 = 11  # for tf32 descriptors, which our kernels do not use


def main(section: str, *arguments: str) -> int:
    """Runs one section, or writes the summary; returns the exit code."""
    if SMOKE:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_triton()
    # Imported here, because Triton must be patched before jax-triton imports it.
    from experiments.benchmarks.gpu import summary

    if section == "summary":
        return summary.main(FOLDER, pathlib.Path(*arguments), START)
    from experiments.benchmarks.gpu import sections, settings
    from experiments.benchmarks.gpu.report import Report

    available = sections.sections()
    if section not in available:
        print(f"unknown section {section!r}; use one of: {', '.join(available)}.", file=sys.stderr)
        return 2
    report = Report(section + "".join(arguments[:1]), FOLDER, start=START, alone=SMOKE)
    sizes = settings.smoke() if SMOKE else settings.full()
    sizes = dataclasses.replace(sizes, with_flashrnn=os.environ.get("FLASHRNN") == "1")
    available[section](report, sizes, *map(int, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
