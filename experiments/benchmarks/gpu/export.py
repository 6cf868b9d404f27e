"""Writes the timed mLSTM calls as `jax.export` files with kernels compiled for a Hopper GPU.

    python -m experiments.benchmarks.gpu.export FOLDER

Needs jax-triton, Triton and JAX's CUDA plugin, but no GPU. Each file has about 150 kB.
"""

import os
import pathlib
import sys

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax import export

from experiments.benchmarks import kernel_jax
from experiments.benchmarks.gpu.settings import full
from pallas_kernels import common

CHIP = "sm_90"
CHECKS = [
    export.DisabledSafetyCheck.custom_call(f"triton_kernel_call{suffix}") for suffix in ("", "_ffi")
]


def main(folder: pathlib.Path) -> int:
    """Writes one file per head size and direction into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = full()
    for heads in settings.heads:
        for part in ("forward", "gradient"):
            case = settings.mlstm_case(part, heads)
            with common.compiled_for(CHIP):
                shapes = jax.eval_shape(lambda case=case: kernel_jax.inputs(case, "triton"))
                jitted = jax.jit(kernel_jax.timed_function(case, "triton"))
                call = export.export(jitted, platforms=["cuda"], disabled_checks=CHECKS)(*shapes)
            file = folder / f"{'x'.join(map(str, heads))}-{part}.export"
            file.write_bytes(call.serialize())
            print(file, file.stat().st_size, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
