"""Rates of a logging interval: tokens and model FLOPs per second, and model FLOP utilization."""

import dataclasses

from pallas_kernels.hardware import peak_flops
from xlstm_jax.sharding.devices import Devices


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is needed to convert seconds per step to rates."""

    num_devices: int
    peak_flops: float | None  # bfloat16 FLOP/s of one device; None: unknown device, no `mfu`
    flops_per_step: float | None  # of the model and a full batch; None: no FLOP rates

    @classmethod
    def on(cls, devices: Devices, flops_per_step: float | None) -> "Rates":
        """The rates of a model on these devices."""
        all_devices = devices.mesh.devices.flat
        return cls(len(all_devices), peak_flops(all_devices[0].device_kind), flops_per_step)

    def at(self, step_time: float, tokens: float, share_of_batch: float) -> dict[str, float]:
        """The rates of steps of `step_time` seconds, with `tokens` targets each on average.

        `share_of_batch` is the mean size of their batches relative to the full batch.
        """
        rates = {"tokens_per_second": tokens / step_time}
        if self.flops_per_step is not None:
            flops = self.flops_per_step * share_of_batch / step_time
            rates["model_flops_per_second"] = flops
        rates |= {f"{name}_per_device": rate / self.num_devices for name, rate in rates.items()}
        if self.flops_per_step is not None and self.peak_flops is not None:
            rates["mfu"] = rates["model_flops_per_second_per_device"] / self.peak_flops
        return rates
