"""The best mesh, rematerialization policy and batch size of a run on given hardware."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from xlstm_jax.config import ConfigError
from xlstm_jax.modules.config import Remat
from xlstm_jax.plan.report import Plan, estimated_plan, plan
from xlstm_jax.plan.topology import Target
from xlstm_jax.sharding.mesh import MeshConfig
from xlstm_jax.sharding.rules import get_rules
from xlstm_jax.train.config import ExperimentConfig

POLICIES: tuple[Remat, ...] = ("none", "dots", "full")
""""names" saves what "full" has to save as well where blocks are scanned; "offload" moves it to the
host, whose bandwidth is not known."""

SEQUENCES = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Per device, of a micro-batch."""

TENSOR = (1, 2, 4, 8)
SEQ = (1, 2, 4, 8, 16)

MAX_COMPILED = 24


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run and its plan by formula."""

    cfg: ExperimentConfig
    estimate: Plan
    num_sequences: int  # per device, of a micro-batch

    @property
    def tokens_per_second(self) -> float:
        """With compute and communication one after the other."""
        return self.estimate.tokens_per_step / sum(self.estimate.seconds.values())

    def is_like(self, other: "Candidate") -> bool:
        """Whether temporaries of the one tell about those of the other."""
        return self.cfg.model.remat == other.cfg.model.remat and all(
            self.estimate.mesh[axis] == other.estimate.mesh[axis] for axis in ("tensor", "seq")
        )


def search(
    cfg: ExperimentConfig,
    target: Target,
    *,
    on_plan: Callable[[Candidate, Plan], None] = lambda candidate, compiled: None,
) -> tuple[Candidate, Plan]:
    """The fastest run of this model and sequence length that fits, with its plan.

    Candidates are compiled in the order of their estimated speed until one fits; those that cannot
    fit, by what was compiled before, are passed over.

    Args:
        cfg: its mesh, rematerialization policy and batch size are replaced.
        on_plan: called with every candidate that was compiled.

    Raises:
        ConfigError: nothing fits.
    """
    tried: list[tuple[Candidate, Plan]] = []
    for candidate in candidates(cfg, target):
        if _least_bytes(candidate, tried) > target.chip.hbm_bytes:
            continue
        compiled = plan(candidate.cfg, target)
        on_plan(candidate, compiled)
        if compiled.fits:
            return candidate, compiled
        tried.append((candidate, compiled))
        if len(tried) == MAX_COMPILED:
            break
    smallest = min((compiled.peak_bytes for _, compiled in tried), default=None)
    needs = "" if smallest is None else f"; the smallest needs {smallest / 2**30:.1f} GiB"
    raise ConfigError(
        f"topology={target.name!r} has no room for this run: of its meshes, {len(tried)} were "
        f"compiled and none fits {target.chip.hbm_bytes / 2**30:.1f} GiB a device{needs}; use more "
        "chips, a shorter data.seq_len or a smaller model."
    )


def candidates(cfg: ExperimentConfig, target: Target) -> list[Candidate]:
    """Every run that may fit by formula, the fastest first."""
    options = [
        candidate
        for mesh in _meshes(target.num_devices)
        for remat in POLICIES
        for num_sequences in SEQUENCES
        if (candidate := _candidate(cfg, target, mesh, remat, num_sequences)) is not None
    ]
    # Ties go to the shortest fsdp groups, then to the smallest batch.
    order = lambda c: (-c.tokens_per_second, c.estimate.mesh["fsdp"], c.num_sequences)  # noqa: E731
    return sorted(options, key=order)


def _meshes(count: int) -> Iterator[MeshConfig]:
    for tensor in TENSOR:
        for seq in SEQ if tensor == 1 else (1,):
            rest = count // (tensor * seq)
            if count % (tensor * seq) == 0:
                for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
                    yield MeshConfig(fsdp=fsdp, seq=seq, tensor=tensor)


def _candidate(
    cfg: ExperimentConfig, target: Target, mesh: MeshConfig, remat: Remat, num_sequences: int
) -> Candidate | None:
    # Devices share one sequence only where a device has no room for one of its own.
    if num_sequences > 1 and mesh.seq > 1:
        return None
    sizes = mesh.sizes(target.num_devices)
    shards = math.prod(sizes[axis] for axis in get_rules(mesh.rules_name())["batch"])
    batch_size = num_sequences * shards * cfg.train.accumulation
    changed = dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(mesh, slstm_seq=cfg.mesh.slstm_seq),
        model=dataclasses.replace(cfg.model, remat=remat),
        data=dataclasses.replace(cfg.data, batch_size=batch_size),
    )
    try:
        estimate = estimated_plan(changed, target)
    except ConfigError:  # lengths that the mesh does not divide
        return None
    return Candidate(changed, estimate, num_sequences) if estimate.fits else None


def _least_bytes(candidate: Candidate, tried: list[tuple[Candidate, Plan]]) -> int:
    """Bytes that a candidate needs, judged by what similar ones took beyond their estimate."""
    beyond = [
        (compiled.peak_bytes - other.estimate.peak_bytes)
        * min(1.0, candidate.num_sequences / other.num_sequences)
        for other, compiled in tried
        if candidate.is_like(other)
    ]
    return candidate.estimate.peak_bytes + int(min(beyond, default=0))
