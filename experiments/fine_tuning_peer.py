"""Compares logits with those of `transformers` and `peft`; `fine_tuning.py` starts it.

    python fine_tuning_peer.py BASE FOLDER

BASE is a checkpoint folder. FOLDER has `logits.npz`, the merged model in `merged` and the adapters
in `adapter`. It prints one line of JSON: the largest difference of each, relative to the largest
logit, and versions.
"""

# pyright: reportMissingImports=false

import json
import pathlib
import sys
from importlib import metadata

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    base, folder = map(pathlib.Path, sys.argv[1:])
    arrays = np.load(folder / "logits.npz")
    tokens, expected = torch.tensor(arrays["tokens"]), arrays["logits"]

    def difference(model: torch.nn.Module) -> float:
        with torch.no_grad():
            logits = model.float().eval()(tokens).logits.numpy()
        return float(np.abs(logits - expected).max() / np.abs(expected).max())

    def load(path: pathlib.Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path)

    result = {
        "transformers": difference(load(folder / "merged")),
        "peft": difference(PeftModel.from_pretrained(load(base), str(folder / "adapter"))),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
