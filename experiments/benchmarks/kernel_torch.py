"""Times the kernels of PyTorch packages, in a separate process; see `kernels.py`.

Imports neither JAX nor this project, so that any interpreter with the packages can run it. As in
`kernel_jax.py`, the only argument is a request in JSON; one line of JSON is printed per case.
"""

# pyright: reportMissingImports=false

import importlib.metadata
import importlib.util
import json
import math
import sys
from typing import Any

PACKAGES = {"mlstm_kernels": "mlstm_kernels", "fla": "flash-linear-attention", "xlstm": "xlstm"}
OPS = {"mlstm_kernels": "mlstm", "fla": "mlstm", "xlstm": "slstm"}
CHUNK = 128
"""Chunk size for `mlstm_kernels`: the fastest in its own benchmark."""


def function(candidate: str, case: dict[str, Any]):
    """The documented call of the package: arrays to h."""
    if candidate == "xlstm":
        return _slstm_cell(case)
    if candidate == "mlstm_kernels":
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

        chunk = min(CHUNK, case["T"])
        return lambda q, k, v, i, f: mlstm_chunkwise__xl_chunk(
            q=q, k=k, v=v, i=i, f=f, return_last_states=False, chunk_size=chunk
        )
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    def simple_gla(q, k, v, i, f):
        del i  # it has no input gate
        return chunk_simple_gla(q, k, v, g=torch.nn.functional.logsigmoid(f.float()))[0]

    return simple_gla


def _slstm_cell(case: dict[str, Any]):
    """The sLSTM cell with its CUDA kernel, which is compiled when the cell is created."""
    import torch
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    sizes = dict(hidden_size=case["H"] * case["K"], num_heads=case["H"], batch_size=case["B"])
    config = sLSTMCellConfig(**sizes, backend="cuda", dtype=case["dtype"])
    cell = sLSTMCell(config).to("cuda")
    with torch.no_grad():
        for parameter in cell.parameters():  # by default the recurrent weights are zero
            parameter.normal_(std=1 / math.sqrt(case["K"]))
    return lambda x: cell(x)[0]


def arrays(candidate: str, case: dict[str, Any]) -> list[Any]:
    """Random inputs in the native layout of the package, so that no transpose is timed."""
    import torch

    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    dtype = getattr(torch, case["dtype"])
    heads_first = candidate == "mlstm_kernels"
    torch.manual_seed(0)
    if candidate == "xlstm":
        return [torch.randn((B, T, 4 * H * K), device="cuda", dtype=dtype)]

    def normal(*width: int):
        axes = (H, T) if heads_first else (T, H)
        return torch.randn((B, *axes, *width), device="cuda", dtype=dtype)

    return [normal(K), normal(K), normal(V), normal(), 3 + normal()]


def make_call(fn, args: list[Any], part: str):
    """A call without arguments: forward, or forward and backward with a random cotangent."""
    import torch

    if part != "gradient":

        def forward():
            with torch.no_grad():
                fn(*args)

        return forward

    args = [x.requires_grad_() for x in args]
    cotangent = torch.randn_like(fn(*args))

    def gradient():
        for x in args:
            x.grad = None  # otherwise backward accumulates into it
        fn(*args).backward(cotangent)

    return gradient


def measure_case(candidate: str, case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Times per call by CUDA events, and peak memory."""
    import torch

    run = make_call(function(candidate, case), arrays(candidate, case), case["part"])
    for _ in range(settings["warmup"]):  # includes the autotuning of the packages
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    each = seconds_per_call(run, 1)
    peak = torch.cuda.max_memory_allocated()
    launches = min(1000, max(1, math.ceil(settings["sample_seconds"] / each)))
    times = [seconds_per_call(run, launches) for _ in range(settings["repeats"])]
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {
        "median_seconds": median,
        "quartiles_seconds": [low, high],
        "fastest_seconds": min(times),
        "repeats": len(times),
        "peak_bytes": peak,
        "peak_from": "allocator",
        "package": f"{PACKAGES[candidate]} {importlib.metadata.version(PACKAGES[candidate])}, "
        f"torch {torch.__version__}",
    }


def seconds_per_call(run, launches: int) -> float:
    """Average time of one of `launches` calls that are launched together."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(launches):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / launches


def refusal(candidate: str, case: dict[str, Any]) -> str | None:
    """Why a package cannot run a case; None if it can be tried."""
    for module in ("torch", candidate):
        if importlib.util.find_spec(module) is None:
            return f"{PACKAGES.get(module, module)} is not installed"
    import torch

    if not torch.cuda.is_available():
        return "its kernels need an NVIDIA GPU, and torch detects none"
    if case["op"] != OPS[candidate] or case["part"] == "decode":
        return f"it has no documented call for {case['op']}, {case['part']}"
    return None


def main(request: dict[str, Any]) -> int:
    """Prints the measurement of every requested case, the reason it was skipped, or its error."""
    for case in request["cases"]:
        record: dict[str, Any] = {}
        try:
            reason = refusal(request["candidate"], case)
            skipped = {"skipped": reason} if reason else None
            record |= skipped or measure_case(request["candidate"], case, request["settings"])
        except Exception as error:  # such as out of memory: measure the other cases
            record["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
