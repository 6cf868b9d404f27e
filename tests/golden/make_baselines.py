"""Makes the golden vectors of Mamba-2 and Qwen3-Next, and the states of all baselines.

    python tests/golden/make_baselines.py

needs `torch` and `transformers`. It writes two checkpoint folders with random parameters, their
`<name>_io.npz`, and `<name>_state.npz` of every baseline: what its cache contains after a prefix,
and greedy tokens. These are computed without a cache: single steps of RWKV in a batch of several
sequences add the state of each sequence to all of them (transformers 5.24).
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
PROMPT, NEW, PREFIX = 7, 8, 11  # tokens
BASELINES = ("llama_tiny", "mamba_tiny", "rwkv4_tiny", "mamba2_tiny", "qwen3_next_tiny")
CONFIGS = {
    "mamba2_tiny": transformers.Mamba2Config(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=6,
        num_heads=6,
        head_dim=8,
        n_groups=2,
        use_bias=True,
        chunk_size=8,
    ),
    "qwen3_next_tiny": transformers.Qwen3NextConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        partial_rotary_factor=0.5,
        max_position_embeddings=64,
        linear_key_head_dim=6,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=0,
    ),
}
"""Folder that this script makes -> config of its model."""


def randomize(model: torch.nn.Module) -> None:
    """Adds noise to every parameter, so that each affects the results."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):  # so that memories last for several steps
                parameter.fill_(-1.5)
            is_matrix = parameter.ndim == 2
            parameter.add_(noise * (parameter.shape[-1] ** -0.5 if is_matrix else 0.3))


def results(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits, loss and gradients."""
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    arrays = {
        "input/ids": ids,
        "output/logits": output.logits,
        "output/loss_shifted": output.loss,
    }
    arrays |= {f"grad/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: array.detach().numpy() for name, array in arrays.items()}


def greedy(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """The first `PROMPT` tokens, and `NEW` greedily chosen ones."""
    sequence = ids[:, :PROMPT]
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(sequence, use_cache=False).logits[:, -1]
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    return sequence.numpy()


def state(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """The cache after the first `PREFIX` tokens: its tensors by layer and name."""
    with torch.no_grad():
        output = model(ids[:, :PREFIX], use_cache=True)
    if "state" in output:  # of RWKV: (batch, width, layers)
        names = ("channel_shift", "time_shift", "c", "n", "m")
        return {
            f"state/{name}": array.numpy() for name, array in zip(names, output.state, strict=True)
        }
    arrays = {}
    for index, layer in enumerate(output.cache.layers):
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            value = getattr(layer, name, None)
            value = value[0] if isinstance(value, (list, tuple, dict)) else value
            if value is not None:
                arrays[f"state/{index}/{name}"] = value.numpy()
    return arrays


def make(name: str, config: transformers.PreTrainedConfig) -> None:
    """Writes a folder with a random model, and its results."""
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        (HERE / name).mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(pathlib.Path(folder) / file, HERE / name / file)
    ids = torch.randint(0, config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))
    np.savez_compressed(HERE / f"{name}_io.npz", about=about(), **results(model, ids))


def about() -> str:
    """Metadata of a file as JSON."""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    return json.dumps({"config": {}, "seed": 0, "versions": packages}, sort_keys=True)


def main() -> None:
    """Writes all files and prints the size of each."""
    torch.set_num_threads(1)
    for name, config in CONFIGS.items():
        make(name, config)
    for name in BASELINES:
        model = transformers.AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32)
        with np.load(HERE / f"{name}_io.npz") as arrays:
            ids = torch.from_numpy(arrays["input/ids"])
        arrays = {"output/greedy_sequence": greedy(model.eval(), ids), **state(model, ids)}
        np.savez_compressed(HERE / f"{name}_state.npz", about=about(), **arrays)
        files = [*(HERE / name).iterdir(), *HERE.glob(f"{name}_*.npz")]
        print(f"{name}: {sum(file.stat().st_size for file in files) / 1e3:.0f} kB, {list(arrays)}")


if __name__ == "__main__":
    main()
