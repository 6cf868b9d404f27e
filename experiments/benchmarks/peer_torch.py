"""Times train steps of the official PyTorch package `xlstm`, in float32 on a CPU.

`peer.py` starts this script in a separate interpreter with `torch`, `xlstm` and `mlstm_kernels`:

    python peer_torch.py large

It first prints one line of JSON: versions, number of parameters and the variant used, the fastest
of those that run on a CPU. Then it reads a number of train steps from each line of standard input,
runs them, and prints the time of each: `{"seconds": [...]}`.
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
SHAPES = {"large": (4, 512), "v1": (8, 256)}  # B, T


def make_large(kernel: str, chunk_size: int) -> torch.nn.Module:
    """The large architecture with width 256, 4 blocks and 4 heads."""
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
        return_last_states=True,  # train mode fails without it
        autocast_kernel_dtype="float32",
    )
    return xLSTMLarge(config)


def make_first_generation() -> torch.nn.Module:
    """A first-generation model with width 128 and 6 blocks, the second an sLSTM block."""
    slstm = sLSTMLayerConfig(
        backend="vanilla",  # the only one that runs on a CPU
        num_heads=4,
        dtype="float32",
        enable_automatic_mixed_precision=False,
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
    """Functions that make the variants of a model that run on a CPU, by description."""
    if name == "v1":
        return {"parallel mLSTM, vanilla sLSTM": make_first_generation}
    return {
        f"{kernel}, chunks of {size}": functools.partial(make_large, kernel, size)
        for kernel in ("native_autograd", "native_custbw")
        for size in (32, 64, 128)
    }


class Trainer:
    """A model, its optimizer, and a random batch that every step reuses."""

    def __init__(self, model: torch.nn.Module, shape: tuple[int, int]):
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        tokens = torch.randint(0, VOCAB_SIZE, (shape[0], shape[1] + 1))
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)
        self.step()  # warm-up

    def step(self) -> float:
        """Runs one train step, with gradient clipping; returns its time in seconds."""
        start = time.perf_counter()
        output = self.model(self.inputs)
        logits = output[0] if isinstance(output, tuple) else output
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss.item()
        return time.perf_counter() - start


def main(name: str) -> None:
    """Selects the fastest variant and times its train steps until standard input ends."""
    warnings.simplefilter("ignore")
    trainers, medians = {}, {}
    for variant, make_model in variants(name).items():
        torch.manual_seed(0)
        trainers[variant] = Trainer(make_model(), SHAPES[name])
        medians[variant] = statistics.median(trainers[variant].step() for _ in range(5))
    variant = min(medians, key=lambda variant: medians[variant])
    trainer = trainers[variant]
    packages = ("xlstm", "mlstm_kernels", "torch")
    description = {
        "variant": variant,
        "tried_median_seconds": medians,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {package: metadata.version(package) for package in packages},
    }
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [trainer.step() for _ in range(int(line))]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
