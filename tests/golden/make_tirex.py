"""Makes the golden vectors of TiRex-2.

    TORCHDYNAMO_DISABLE=1 python tests/golden/make_tirex.py

needs `tirex-2` and its dependencies. It writes the checkpoint folder `tirex2_tiny`, with random
parameters, and `tirex2_tiny_io.npz`: float64 results of the network for three series in one batch,
and of `forecast` for a series with gaps and for one with a trend and covariates.
"""

import json
import pathlib
from importlib import metadata

import numpy as np
import safetensors.torch
import torch
from tirex2 import ForecastModel, TimeseriesType
from tirex2._state_dict import shared_tensor_groups
from tirex2.model import TiRex2

HERE = pathlib.Path(__file__).parent
NAME = "tirex2_tiny"
DIM, PATCH, CONTEXT, FUTURE, HORIZON = 24, 8, 64, 24, 18
NAN = float("nan")


def template(kind: str) -> dict:
    """One kind of block."""
    return {
        "time_mixer": {
            "model_type": kind,
            "embedding_dim": DIM,
            "num_heads": 2,
            "num_slstm_heads": 4,
        },
        "variate_mixer": {"embedding_dim": DIM, "num_heads": 3},
        "dropout": 0.1,
        "eps": 1e-7,
    }


CONFIG = {
    "stack_config": {
        "templates": {"slstm": template("bi-slstm"), "mlstm": template("bi-mlstm")},
        "recipe": ["slstm", "mlstm"],
    },
    "num_blocks": 2,
    "embedding_dim": DIM,
    "input_patch_size": PATCH,
    "output_patch_size": PATCH,
    "quantiles": [0.1, 0.3, 0.5, 0.7, 0.9],
    "tokenizer_cfg": {
        "output_patch_size": PATCH,
        "input_patch_size": PATCH,
        "input_patch_stride": PATCH,
    },
    "scaler_cfg": {"use_arcsinh": True, "binaryaware": True},
    "h_expand": 2,
    "context_len": CONTEXT,
    "future_len": FUTURE,
    "input_ff_dim": 40,
    "act_func": "SiLU",
    "dropout": 0.1,
    # Of the two norms with this function, the other one has float32 statistics.
    "stack_out_norm_config": {"eps": 1e-7, "use_rmsnorm": True},
    "tta_sign_flip": True,
    "tta_diff": True,
}


def make_model() -> torch.nn.Module:
    """A model with noise in every parameter, so that each affects the results."""
    torch.manual_seed(0)
    model = TiRex2(**CONFIG, device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3))
    return model


def save(model: torch.nn.Module) -> None:
    """Writes the folder, with one name for each tensor, as the published one."""
    tensors = model.state_dict()
    for names in shared_tensor_groups(model):
        for name in names[1:]:
            del tensors[name]
    (HERE / NAME).mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, HERE / NAME / "model.safetensors")
    (HERE / NAME / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, where all of its parts support that."""
    for module in model.modules():
        if hasattr(module, "force_float32_reductions"):
            module.force_float32_reductions = False
    return model.double()


def series() -> dict[str, torch.Tensor]:
    """The inputs: `network` is a batch, with its groups; the others are of two forecasts."""
    rng = np.random.default_rng(0)
    t = np.arange(100)
    gaps = 5 + np.sin(t[:50] / 3) + 0.1 * rng.standard_normal(50)
    gaps[[0, 7, 8, 9, 31]] = NAN
    gaps[16:30] = NAN
    trend = 100 + 0.7 * t[:90] + rng.standard_normal(90)  # longer than the context
    trend[[3, 40, 89]] = NAN
    season = np.cos(t[:90] / 4) + 0.2 * rng.standard_normal(90)
    past = np.stack([np.roll(season, 2), rng.standard_normal(90)])
    past[0, 20:26] = NAN
    known = np.stack([np.sin(t / 5), t % 7 == 0], dtype=float)
    known = np.concatenate([known, known[:, :20]], axis=1)[:, : 90 + HORIZON + 3]
    batch = rng.standard_normal((8, CONTEXT + FUTURE)).cumsum(axis=1)
    batch[3] = batch[3] > 0  # a binary covariate
    batch[[0, 1, 2, 5, 7], CONTEXT:] = NAN
    batch[0, 5:20] = NAN
    batch[7, :30] = NAN
    arrays = {
        "gaps": gaps[None],
        "targets": np.stack([trend, season]),
        "past": past,
        "future": known,
        "network": batch,
        "group": np.array([1, 1, 1, 1, 1, 2, 2, 3.0]),
        "is_target": np.array([1, 1, 0, 0, 0, 1, 0, 1]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def results(model: torch.nn.Module, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the network and `forecast` return, with and without its options."""
    batch = {"x": x["network"], "group_vector": x["group"], "target_mask": x["is_target"] == 1}
    both = [
        TimeseriesType(x["gaps"], None, None),
        TimeseriesType(x["targets"], x["past"], x["future"]),
    ]
    past_only = [TimeseriesType(x["targets"], x["past"], None)]
    plain = {"tta_sign_flip": False, "tta_diff": False}
    forecast = ForecastModel(model).forecast
    with torch.no_grad():
        arrays = {"network": model(batch)}
        arrays["gaps"], arrays["covariates"] = forecast(both, HORIZON)
        (arrays["past_only"],) = forecast(past_only, FUTURE)
        rising = TimeseriesType(x["targets"][:1, :50], None, None)  # shorter than the context
        (arrays["trend"],) = forecast([rising], HORIZON)
        arrays["plain"] = forecast(both, HORIZON, **plain)[1]
        (arrays["short"],) = forecast(both[:1], HORIZON, pad_context=False)
    return arrays


def main() -> None:
    """Writes all files and prints their size."""
    torch.set_num_threads(1)
    model, inputs = make_model(), series()
    save(model)
    arrays = {f"input/{name}": array for name, array in inputs.items()}
    outputs = results(in_float64(model), inputs)
    arrays |= {f"output64/{name}": array for name, array in outputs.items()}
    packages = ("tirex-2", "torch", "flashrnn", "mlstm_kernels")
    versions = {name: metadata.version(name) for name in packages}
    about = json.dumps({"config": {"horizon": HORIZON}, "seed": 0, "versions": versions})
    path = HERE / f"{NAME}_io.npz"
    np.savez_compressed(path, about=about, **{name: a.numpy() for name, a in arrays.items()})
    files = [path, *(HERE / NAME).iterdir()]
    print(", ".join(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB" for file in files))


if __name__ == "__main__":
    main()
