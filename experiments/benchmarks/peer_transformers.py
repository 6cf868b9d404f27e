"""Times train steps of a model of `transformers`, in float32 on a CPU.

`baselines.py` starts this script in an interpreter with `torch` and `transformers`:

    python peer_transformers.py FOLDER

The folder is a checkpoint, and has `tokens.npy`. It first prints one line of JSON: versions, number
of parameters, and the loss on these tokens. Then it reads a number of train steps from each line of
standard input, runs them, and prints the time of each: `{"seconds": [...]}`.
"""

# pyright: reportMissingImports=false

import json
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Trainer:
    """A model, its optimizer, and a batch that every step reuses."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        with torch.no_grad():
            self.first_loss = self.loss().item()

    def loss(self) -> torch.Tensor:
        """The mean cross entropy of the batch."""
        logits = self.model(self.inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.targets)

    def step(self) -> float:
        """Runs one train step, with gradient clipping; returns its time in seconds."""
        start = time.perf_counter()
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss.item()
        return time.perf_counter() - start


def main(folder: str) -> None:
    """Times train steps until standard input ends."""
    warnings.simplefilter("ignore")
    trainer = Trainer(Path(folder))
    description = {
        "loss": trainer.first_loss,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {package: metadata.version(package) for package in ("transformers", "torch")},
    }
    trainer.step()  # warm-up
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [trainer.step() for _ in range(int(line))]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
