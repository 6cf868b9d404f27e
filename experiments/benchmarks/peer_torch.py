"""Train steps of the official PyTorch package, timed on request.

Runs in a separate interpreter with `torch`, `xlstm` and `mlstm_kernels`, and uses only public
classes of the package. It writes JSON lines to standard output:

    python peer_torch.py large        # first line of output: versions, parameters, variants tried
    5                                 # each line of input: a number of train steps to run ...
    {"seconds": [...]}                # ... answered with the time of each step

Both models are float32. Of the variants of a model that a CPU can run, the fastest is used.
"""

# pyright: reportMissingImports=false

import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)
from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

VOCAB_SIZE = 256
SHAPES = {"large": (4, 512), "v1": (8, 256)}


def large(kernel: str, chunk_size: int) -> torch.nn.Module:
    """Width 256, 4 blocks, 4 heads. Returns states, because train mode fails without."""
    config = xLSTMLargeConfig(
        embedding_dim=256,
        num_heads=4,
        num_blocks=4,
        vocab_size=VOCAB_SIZE,
        chunkwise_kernel=f"chunkwise--{kernel}",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="train",
        chunk_size=chunk_size,
        return_last_states=True,
        autocast_kernel_dtype="float32",
    )
    return xLSTMLarge(config)


def first_generation() -> torch.nn.Module:
    """Width 128, 6 blocks, the second an sLSTM with `vanilla` backend, the only one on a CPU."""
    slstm = sLSTMLayerConfig(
        backend="vanilla", num_heads=4, dtype="float32", enable_automatic_mixed_precision=False
    )
    config = xLSTMLMModelConfig(
        vocab_size=VOCAB_SIZE,
        embedding_dim=128,
        num_blocks=6,
        context_length=256,
        slstm_at=[1],
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=4)),
        slstm_block=sLSTMBlockConfig(slstm=slstm, feedforward=FeedForwardConfig(proj_factor=1.3)),
    )
    model = xLSTMLMModel(config)
    model.reset_parameters()
    return model


def variants(name: str) -> dict[str, Callable[[], torch.nn.Module]]:
    """Variants of a model that run on a CPU."""
    if name == "v1":
        return {"parallel mLSTM, vanilla sLSTM": first_generation}
    return {
        f"{kernel}, chunks of {size}": functools.partial(large, kernel, size)
        for kernel in ("native_autograd", "native_custbw")
        for size in (32, 64, 128)
    }


class Training:
    """A model, its optimizer, and one batch that every step trains on."""

    def __init__(self, model: torch.nn.Module, shape: tuple[int, int]):
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        tokens = torch.randint(0, VOCAB_SIZE, (shape[0], shape[1] + 1))
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)
        self.step()  # warm-up

    def step(self) -> float:
        """Runs one step (forward, loss, backward, gradient clipping, update); returns seconds."""
        start = time.perf_counter()
        out = self.model(self.inputs)
        logits = out[0] if isinstance(out, tuple) else out
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss.item()
        return time.perf_counter() - start


def main(name: str) -> None:
    """Selects the fastest variant and serves requests until the end of the input."""
    warnings.simplefilter("ignore")
    trainings, medians = {}, {}
    for variant, make in variants(name).items():
        torch.manual_seed(0)
        trainings[variant] = Training(make(), SHAPES[name])
        medians[variant] = statistics.median(trainings[variant].step() for _ in range(5))
    variant = min(medians, key=lambda variant: medians[variant])
    training = trainings[variant]
    packages = ("xlstm", "mlstm_kernels", "torch")
    description = {
        "variant": variant,
        "tried_median_seconds": medians,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {package: metadata.version(package) for package in packages},
    }
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [training.step() for _ in range(int(line))]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
