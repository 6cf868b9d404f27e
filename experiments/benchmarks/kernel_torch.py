"""Times the kernels of PyTorch packages, in a process of its own; see `kernels.py`.

Imports nothing of ours and no JAX, so that any interpreter with the packages can run it. As in
`kernel_jax.py`, the one argument is JSON and every case is answered with a line of JSON.
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
"""Of `mlstm_kernels`: the fastest in its own benchmark."""


def function(candidate: str, case: dict[str, Any]):
    """h of the arrays by the package's documented call."""
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
    """The cell with its CUDA kernel, which is compiled when it is made."""
    import torch
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    sizes = dict(hidden_size=case["H"] * case["K"], num_heads=case["H"], batch_size=case["B"])
    config = sLSTMCellConfig(**sizes, backend="cuda", dtype=case["dtype"])
    cell = sLSTMCell(config).to("cuda")
    with torch.no_grad():
        for parameter in cell.parameters():  # its own start from zero recurrent weights
            parameter.normal_(std=1 / math.sqrt(case["K"]))
    return lambda x: cell(x)[0]


def arrays(candidate: str, case: dict[str, Any]) -> list[Any]:
    """Random inputs in the package's own layout: no time goes into transposing."""
    import torch

    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    dtype = getattr(torch, case["dtype"])
    heads_first = candidate == "mlstm_kernels"
    torch.manual_seed(0)
    if candidate == "xlstm":
        return [torch.randn((B, T, 4 * H * K), device="cuda", dtype=dtype)]

    def normal(*width: int):
        rows = (H, T) if heads_first else (T, H)
        return torch.randn((B, *rows, *width), device="cuda", dtype=dtype)

    return [normal(K), normal(K), normal(V), normal(), 3 + normal()]


def call(fn, args: list[Any], part: str):
    """A call without arguments: forward, or forward and backward for a random cotangent."""
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
            x.grad = None
        fn(*args).backward(cotangent)

    return gradient


def measured(candidate: str, case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Times of one call by the device's clock, and the most memory allocated."""
    import torch

    run = call(function(candidate, case), arrays(candidate, case), case["part"])
    for _ in range(settings["warmup"]):  # packages that tune themselves do it here
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    each = seconds_of(run, 1)
    peak = torch.cuda.max_memory_allocated()
    launches = min(1000, max(1, math.ceil(settings["sample_seconds"] / each)))
    times = [seconds_of(run, launches) for _ in range(settings["repeats"])]
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


def seconds_of(run, launches: int) -> float:
    """Of one of several calls sent off together."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(launches):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / launches


def refusal(candidate: str, case: dict[str, Any]) -> str | None:
    """Why a package has no answer to a case, before it is tried."""
    for module in ("torch", candidate):
        if importlib.util.find_spec(module) is None:
            return f"{PACKAGES.get(module, module)} is not installed"
    import torch

    if not torch.cuda.is_available():
        return "its kernels need an NVIDIA GPU, and torch finds none"
    if case["op"] != OPS[candidate] or case["part"] == "decode":
        return f"it has no documented call for {case['op']}, {case['part']}"
    return None


def main(request: dict[str, Any]) -> int:
    for case in request["cases"]:
        answer: dict[str, Any] = {}
        try:
            reason = refusal(request["candidate"], case)
            found = {"skipped": reason} if reason else None
            answer |= found or measured(request["candidate"], case, request["settings"])
        except Exception as error:  # too large for the device, say: other cases go on
            answer["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
