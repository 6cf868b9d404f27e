"""What does a step of training take of a TPU pod that is not here?

An answer: the whole step, optimiser included, compiled by libtpu for the pod, with the bytes that
each chip holds and the communication in the program. Weights and moments are cut over all chips,
rows of the batch as well; nothing may be held whole by accident.

    .venv-compile/bin/python experiments/benchmarks/tpu_train_step.py --topology v5e:4x4

Nothing is timed. The kernels are those of `pallas_kernels`.
"""

import collections
import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import tpu_offline
from xlstm_jax.data import Batch
from xlstm_jax.modules import LM, presets
from xlstm_jax.sharding import get_rules, path_name, sharding_of
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import first_state
from xlstm_jax.train.step import make_train_step

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    preset: str = "scaling_1.4b"
    topology: str = "v5e:4x4"
    seq_len: int = 2048
    rows_per_chip: int = 1
    out: pathlib.Path | None = None


def compile_step(args: Arguments) -> tuple[jax.stages.Compiled, Any]:
    """The step, and its state as shapes with shardings."""
    devices = tpu_offline.devices(args.topology)
    ring = mesh_utils.create_device_mesh((len(devices),), devices=devices)
    mesh = tpu_offline.mesh_of(ring.tolist(), fsdp=len(devices))
    model, cfg = LM(presets.get(args.preset)), TrainConfig()
    tx = make_optimizer(cfg)

    def start(seed):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return first_state(model.init(jax.random.key(seed), tokens)["params"], tx)

    state = jax.eval_shape(start, jax.ShapeDtypeStruct((), jnp.uint32))
    state = jax.tree_util.tree_map_with_path(lambda path, x: _placed(path, x, mesh), state)
    shape = (len(devices) * args.rows_per_chip, args.seq_len)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    number = lambda dtype, sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=rows)  # noqa: E731
    batch = Batch(
        inputs=number(jnp.int32, shape),
        targets=number(jnp.int32, shape),
        segment_ids=number(jnp.int32, shape),
        weights=number(jnp.float32, shape),
        index=number(jnp.int32, shape[:1]),
    )
    step = make_train_step(model, tx, cfg)
    chip = args.topology.split(":")[0]
    compiled = tpu_offline.compile_placed(chip, step, state, batch, mesh=mesh, donate=0)
    return compiled, state


def _placed(path, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Parameters and their moments by the rules for parameters; what has no axes whole."""
    name = re.sub(r"^.*?(params|mu|nu)/", "", path_name(path))
    whole = NamedSharding(mesh, P())
    place = sharding_of(name, leaf.shape, get_rules("fsdp"), mesh) if leaf.ndim else whole
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def report(args: Arguments) -> dict[str, Any]:
    """Bytes per chip, of what kind, and the collectives by number."""
    start = time.perf_counter()
    compiled, state = compile_step(args)
    memory = compiled.memory_analysis()
    assert memory is not None
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    text = str(compiled.as_text())
    found = collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return {
        "preset": args.preset,
        "topology": args.topology,
        "chips": len(tpu_offline.devices(args.topology)),
        "rows_per_chip": args.rows_per_chip,
        "seq_len": args.seq_len,
        "parameters": count(state.params),
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "state_bytes_per_chip": memory.alias_size_in_bytes,
        "argument_bytes_per_chip": memory.argument_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "kernels": sorted(tpu_offline.kernels(compiled)),
        "collectives": dict(found),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def main(args: Arguments) -> int:
    tpu_offline.start()
    found = report(args)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
