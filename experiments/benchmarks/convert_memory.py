"""How much memory does it take to read the weights of another implementation?

An answer: a checkpoint of 1 GiB in shards is read, and made a run of, with a peak below 1.5 GiB
above the interpreter. What the way back takes is measured too: the parameters and one of its files.

    python experiments/benchmarks/convert_memory.py --out RESULT.json

It writes a checkpoint of random weights, as `transformers` would, into a temporary folder, and
reads it in processes of their own: their peak is what the kernel counted, files mapped into memory
included. The bare interpreter and the interpreter with everything imported are measured alike.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks import measure
from xlstm_jax.convert import hf, mapping, names, writing
from xlstm_jax.flops import count_params
from xlstm_jax.modules import presets

GIB = 2**30
DEMANDED_GIB = 1.5
MODEL = presets.large(1024, 17, 4, 2752, vocab_size=25_600)  # 1.00 GiB in float32

# What each process does.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a checkpoint, read it, print the peaks, and write them as JSON."""

    shard_mib: int = 256  # of one file
    out: pathlib.Path | None = None  # where the JSON goes; None: only the summary is printed


def main(options: Options) -> int:
    """Returns 0."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place, "hf")
        write_checkpoint(folder, options.shard_mib * 2**20)
        files = sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
        folders = {"folder": str(folder), "run": f"{place}/run", "back": f"{place}/back"}
        peaks = {name: peak(code.format(**folders)) for name, code in PROCESSES.items()}
    result = {
        **measure.about("convert_memory"),
        "parameters": count_params(MODEL),
        "checkpoint_bytes": sum(files),
        "files": len(files),
        "peak_bytes": peaks,
        "demanded_gib_above_interpreter": DEMANDED_GIB,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(sentences(result)))
    return 0


def write_checkpoint(folder: pathlib.Path, shard_bytes: int) -> None:
    """Random weights, made one tensor at a time."""
    files = {hf.CONFIG: json.dumps(hf.config_of(MODEL))}
    writing.write(
        folder, random_tensors(), dtype="float32", max_shard_bytes=shard_bytes, files=files
    )


def random_tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of the model, as `transformers` has them."""
    rng = np.random.default_rng(0)
    for name, place in mapping.targets(MODEL, names.HF, mapping.parameters(MODEL)).items():
        yield name, rng.standard_normal(place.their_shape, np.float32) / 32


def peak(code: str) -> int:
    """The largest resident size, in bytes, of a process that runs some code."""
    # Not ru_maxrss, which begins with the size of the process that started this one.
    ending = "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
    command = [sys.executable, "-c", f"{code}\n{ending}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) * 1024  # Linux counts in KiB


def sentences(result: dict[str, Any]) -> list[str]:
    """The result in lines to read."""
    peaks = result["peak_bytes"]
    bare = peaks["interpreter"]
    lines = [
        f"checkpoint: {result['checkpoint_bytes'] / GIB:.2f} GiB in {result['files']} files, "
        f"{result['parameters']:,} parameters; demanded of reading: below {DEMANDED_GIB} GiB"
    ]
    return lines + [
        f"{name}: peak {size / GIB:.2f} GiB, {(size - bare) / GIB:.2f} GiB above the interpreter"
        for name, size in peaks.items()
    ]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
