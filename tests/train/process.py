"""One process of a multi-process run: python -m tests.train.process OPTIONS (a JSON object)."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np


def main(options: dict) -> None:
    """Trains, and logs the window indices of each local batch to a file next to the run folder."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options["devices"])
    from xlstm_jax.config import from_dict
    from xlstm_jax.sharding import Devices, init_distributed
    from xlstm_jax.sharding.distributed import Processes
    from xlstm_jax.train import ExperimentConfig, fit, manifest

    init_distributed(from_dict(Processes, options["processes"]))
    process_id = jax.process_index()
    index_file = Path(options["run_dir"]).parent / f"{options['name']}_{process_id}.jsonl"
    shard_batch = Devices.batch

    def record_indices(self, batch, batch_size=None):
        if batch_size is not None:  # a training batch
            with index_file.open("a") as file:
                file.write(json.dumps(batch.index.tolist()) + "\n")
        return shard_batch(self, batch, batch_size)

    Devices.batch = record_indices

    def send_signal(step, record):
        for event in options.get("events", []):
            if (process_id, step) == (event["process"], event["step"]) and "loss" in record:
                os.kill(os.getpid(), signal.Signals[event["signal"]])

    write = manifest.write

    def die_while_saving(folder):
        if folder.name.split(".")[0] == str(options.get("killed_while_saving")):
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    manifest.write = die_while_saving
    cfg = from_dict(ExperimentConfig, options["config"])

    def export(folder, params):
        folder.mkdir()
        size = sum(np.asarray(leaf).size for leaf in jax.tree.leaves(params))
        (folder / "size").write_text(str(size))

    result = fit(cfg, options["run_dir"], on_metrics=send_signal, exporter=export)
    print(json.dumps(dataclasses.asdict(Result(result.step, result.finished))), flush=True)


@dataclasses.dataclass
class Result:
    """The result that a process prints."""

    step: int
    finished: bool


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
