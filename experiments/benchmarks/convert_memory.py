"""Measures the peak memory of weight conversion.

Target: loading a sharded checkpoint of 1 GiB, and converting it to a run, peaks below 1.5 GiB above
the interpreter. Converting back is measured too; it needs the parameters and one output file.

    python experiments/benchmarks/convert_memory.py --out RESULT.json

It writes a checkpoint of random weights in the format of `transformers` to a temporary folder and
reads it in separate processes. Their peak is the one reported by the kernel, memory-mapped files
included. For comparison, the bare interpreter and one with all imports are measured as well.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from experiments.benchmarks import measure
from xlstm_jax.convert import hf, mapping, names, tensors
from xlstm_jax.flops import count_params
from xlstm_jax.modules import presets

GIB = 2**30
TARGET_GIB = 1.5
MODEL = presets.large(1024, 17, 4, 2752, vocab_size=25_600)  # 1.00 GiB in float32

PROCESSES = {
    "interpreter": "",
    "imports": "import jax; from xlstm_jax import convert; from xlstm_jax.cli import main; "
    "jax.numpy.zeros(1)",
    "load_hf": "import jax; from xlstm_jax import convert; "
    "jax.block_until_ready(convert.load_hf({folder!r})[1])",
    "hf-to-run": "from xlstm_jax.cli import main; "
    "main(['convert', 'hf-to-run', {folder!r}, {run!r}])",
    "run-to-hf": "from xlstm_jax.cli import main; "
    "main(['convert', 'run-to-hf', {run!r}, {back!r}, "
    "'--max-shard-bytes', str(2**28)])",
}
"""Code of each process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Options of the conversion benchmark."""

    shard_mib: int = 256  # size of one file of the checkpoint


def main(args: Arguments) -> int:
    """Measures the peak memory of every process and writes one result."""
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent, "hf")
        write_checkpoint(folder, args.shard_mib * 2**20)
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        folders = {"folder": str(folder), "run": f"{parent}/run", "back": f"{parent}/back"}
        peaks = {name: peak(code.format(**folders)) for name, code in PROCESSES.items()}
    result = {
        **measure.run_info("convert_memory"),
        "parameters": count_params(MODEL),
        "checkpoint_bytes": sum(sizes),
        "files": len(sizes),
        "peak_bytes": peaks,
        "target_gib_above_interpreter": TARGET_GIB,
    }
    measure.write(args.out, result)
    print(f"checkpoint: {sum(sizes) / GIB:.2f} GiB in {len(sizes)} files")
    for name, size in peaks.items():
        above = size - peaks["interpreter"]
        print(f"{name}: peak {size / GIB:.2f} GiB, {above / GIB:.2f} GiB above the interpreter")
    return 0


def write_checkpoint(folder: pathlib.Path, shard_bytes: int) -> None:
    """Writes a checkpoint of random weights, generating one tensor at a time."""
    files = {hf.CONFIG: json.dumps(hf.config_of(MODEL))}
    tensors.write(
        folder, random_tensors(), dtype="float32", max_shard_bytes=shard_bytes, files=files
    )


def random_tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Random tensors with the names and shapes that `transformers` uses."""
    rng = np.random.default_rng(0)
    for name, target in mapping.targets(MODEL, names.HF, mapping.parameters(MODEL)).items():
        yield name, rng.standard_normal(target.torch_shape, np.float32) / 32


def peak(code: str) -> int:
    """Peak resident set size, in bytes, of a process that runs `code`."""
    # Not ru_maxrss: it starts at the size of the parent process.
    ending = "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
    command = [sys.executable, "-c", f"{code}\n{ending}"]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(process.stdout.split()[-1]) * 1024  # Linux counts in KiB


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
