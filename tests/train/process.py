"""One process of a run of several: python -m tests.train.process OPTIONS, a JSON object."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax


def main(options: dict) -> None:
    """Trains; writes the rows that this process has fed, step by step, beside the run."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options["devices"])
    from xlstm_jax.config import from_dict
    from xlstm_jax.sharding import Devices, init_distributed
    from xlstm_jax.sharding.distributed import Processes
    from xlstm_jax.train import ExperimentConfig, fit, manifest

    init_distributed(from_dict(Processes, options["processes"]))
    number = jax.process_index()
    fed = Path(options["run_dir"]).parent / f"{options['name']}_{number}.jsonl"
    place = Devices.batch

    def note_rows(self, rows, num_rows=None):
        if num_rows is not None:
            with fed.open("a") as file:
                file.write(json.dumps(rows.index.tolist()) + "\n")
        return place(self, rows, num_rows)

    Devices.batch = note_rows

    def note_step(step, record):
        for event in options.get("events", []):
            if (number, step) == (event["process"], event["step"]) and "loss" in record:
                os.kill(os.getpid(), signal.Signals[event["signal"]])

    write = manifest.write

    def die_while_saving(folder):
        if folder.name.split(".")[0] == str(options.get("killed_while_saving")):
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    manifest.write = die_while_saving
    cfg = from_dict(ExperimentConfig, options["config"])
    result = fit(cfg, options["run_dir"], on_metrics=note_step)
    print(json.dumps(dataclasses.asdict(Result(result.step, result.finished))), flush=True)


@dataclasses.dataclass
class Result:
    """What is said at the end."""

    step: int
    finished: bool


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
