"""What does a mesh of one device cost, beside the same train step without any?

An answer: less than 2 %. Rules are then nobody's, `shard_map` and constraints are left out, and the
state is said to lie where it lies.

    python experiments/benchmarks/mesh.py --out RESULT.json

The two take turns, a few steps each, so that a busy moment of the machine hits both; use a machine
that does nothing else.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import tyro

from experiments.benchmarks import cases, measure
from experiments.benchmarks.cases import Case
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.modules import LM
from xlstm_jax.sharding import MeshConfig, make_devices, use_rules
from xlstm_jax.sharding.rules import RulesName
from xlstm_jax.train import init_state, make_optimizer, make_train_step

STEPS_IN_TURN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, print a summary, and write everything as JSON."""

    rules: RulesName = "fsdp"  # of the mesh
    repeats: int = 60  # timed steps of each side
    out: pathlib.Path | None = None  # where the JSON goes; None: only the summary is printed

    def __post_init__(self):
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}; 60 is usual.")


def sharded_step(case: Case, rules: RulesName) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """As `cases.compiled_step`, on a mesh of one device, as a run has it."""
    devices = make_devices(MeshConfig(rules=rules), jax.devices()[:1])
    lm, tx = LM(case.model), make_optimizer(cases.TRAIN)
    step = make_train_step(lm, tx, cases.TRAIN)

    def update(state, batch):
        with use_rules(devices.rules):
            state, metrics = step(state, batch)
        return devices.constrain(state), metrics

    with devices.active():
        state = init_state(lm, tx, jax.random.key(0), jax.numpy.zeros((1, 1), int), devices=devices)
        batch = devices.batch(jax.device_get(cases.random_batch(case)))
        program = jax.jit(update, donate_argnums=0).lower(state, batch).compile()

    def advance():
        nonlocal state
        with devices.active():
            state, metrics = program(state, batch)
        return metrics

    return advance, program


def in_turns(case: Case, options: Options) -> dict[str, Any]:
    """Both sides of a case, and by how much the mesh takes longer."""
    plain, program = cases.compiled_step(case)
    sharded, placed = sharded_step(case, options.rules)
    times: dict[str, list[float]] = {"plain": [], "mesh": []}
    for call in (plain, sharded):
        measure.seconds(call, 3)
    while len(times["mesh"]) < options.repeats:
        count = min(STEPS_IN_TURN, options.repeats - len(times["mesh"]))
        times["plain"] += measure.seconds(plain, count)
        times["mesh"] += measure.seconds(sharded, count)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        **{name: measure.summary(found) for name, found in times.items()},
        "temporary_bytes": {
            "plain": measure.temporary_bytes(program),
            "mesh": measure.temporary_bytes(placed),
        },
        "overhead": medians["mesh"] / medians["plain"] - 1,
    }


def main(options: Options) -> int:
    """Measure all cases; 0."""
    cpu.prepare()
    result = {**measure.about("mesh"), "rules": options.rules}
    for name, case in cases.CASES.items():
        found = result[name] = in_turns(case, options)
        middle = {side: 1e3 * found[side]["median_seconds"] for side in ("plain", "mesh")}
        print(
            f"{name}: {middle['plain']:.1f} ms without a mesh, {middle['mesh']:.1f} ms on a mesh "
            f"of one device, {found['overhead']:+.1%}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
