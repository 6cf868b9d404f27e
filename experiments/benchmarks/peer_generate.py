"""Times decoding with a model of `transformers`, in float32 on a CPU.

`generate.py` starts this script in an interpreter with `torch` and `transformers`:

    python peer_generate.py FOLDER

The folder is a checkpoint, and has `prompts.npy`, `N T` tokens. It first prints one line of JSON:
versions, and the greedy tokens after the prompts. Then it reads a number of calls from each line of
standard input, and prints the time of each, without prefill: `{"seconds": [...]}`.
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

NEW_TOKENS = 64


class Decoder:
    """A model and prompts; decodes greedily from the state after the prompts."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompts = torch.from_numpy(np.load(folder / "prompts.npy")).long()

    @torch.inference_mode()
    def decode(self) -> tuple[float, list[list[int]]]:
        """Seconds of `NEW_TOKENS` steps, prefill not counted, and the tokens."""
        out = self.model(self.prompts, use_cache=True)
        name = "cache_params" if "cache_params" in out else "past_key_values"
        tokens, start = [], time.perf_counter()
        for _ in range(NEW_TOKENS):
            tokens.append(out.logits[:, -1:].argmax(-1))
            out = self.model(tokens[-1], use_cache=True, **{name: out[name]})
        seconds = time.perf_counter() - start
        return seconds, torch.cat(tokens, dim=1).tolist()


def main(folder: str) -> None:
    """Times decoding until standard input ends."""
    warnings.simplefilter("ignore")
    decoder = Decoder(Path(folder))
    description = {
        "tokens": decoder.decode()[1],  # and a warm-up
        "threads": torch.get_num_threads(),
        "versions": {package: metadata.version(package) for package in ("transformers", "torch")},
    }
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": [decoder.decode()[0] for _ in range(int(line))]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
