"""Searches for the fastest mesh, rematerialization policy and batch size of a run on a target."""

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
"""Rematerialization policies to try. Where blocks are scanned, "names" saves only what "full" saves
too; "offload" moves it to the host, whose bandwidth is not known."""

SEQUENCES_PER_DEVICE = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Sizes of a micro-batch on one device to try."""

TENSOR_SIZES = (1, 2, 4, 8)
SEQ_SIZES = (1, 2, 4, 8, 16)

MAX_COMPILED = 24
"""Compiled candidates after which the search gives up."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration of a run, and its plan by formula."""

    cfg: ExperimentConfig
    estimate: Plan
    num_sequences: int  # per device, of a micro-batch

    @property
    def tokens_per_second(self) -> float:
        """Estimated throughput if compute and communication do not overlap."""
        return self.estimate.tokens_per_step / sum(self.estimate.seconds.values())

    def is_similar(self, other: "Candidate") -> bool:
        """Whether the temporaries of both can be compared: same policy, tensor and seq sizes."""
        return self.cfg.model.remat == other.cfg.model.remat and all(
            self.estimate.mesh[axis] == other.estimate.mesh[axis] for axis in ("tensor", "seq")
        )


def search(
    cfg: ExperimentConfig,
    target: Target,
    *,
    on_plan: Callable[[Candidate, Plan], None] = lambda candidate, compiled: None,
) -> tuple[Candidate, Plan]:
    """The fastest configuration of a model and sequence length that fits a target, and its plan.

    Compiles candidates in the order of their estimated speed until one fits. Skips candidates that
    cannot fit, judging by similar ones compiled before.

    Args:
        cfg: the run; its mesh, rematerialization policy and batch size are replaced.
        on_plan: called with each compiled candidate and its plan.

    Raises:
        ConfigError: no candidate fits.
    """
    tried: list[tuple[Candidate, Plan]] = []
    for candidate in candidates(cfg, target):
        if _min_bytes(candidate, tried) > target.chip.hbm_bytes:
            continue
        compiled = plan(candidate.cfg, target)
        on_plan(candidate, compiled)
        if compiled.fits:
            return candidate, compiled
        tried.append((candidate, compiled))
        if len(tried) == MAX_COMPILED:
            break
    smallest = min((compiled.peak_bytes for _, compiled in tried), default=None)
    needs = "" if smallest is None else f", the smallest needs {smallest / 2**30:.1f} GiB"
    raise ConfigError(
        f"topology={target.name!r} must fit the run in {target.chip.hbm_bytes / 2**30:.1f} GiB per "
        f"device, but none of {len(tried)} compiled configurations fits{needs}; use more chips, a "
        "shorter data.seq_len or a smaller model."
    )


def candidates(cfg: ExperimentConfig, target: Target) -> list[Candidate]:
    """All candidates that fit by formula, fastest first."""
    unordered = [
        candidate
        for mesh in _meshes(target.num_devices)
        for remat in POLICIES
        for num_sequences in SEQUENCES_PER_DEVICE
        if (candidate := _candidate(cfg, target, mesh, remat, num_sequences)) is not None
    ]
    # Ties: smaller fsdp groups first, then smaller batches.
    order = lambda c: (-c.tokens_per_second, c.estimate.mesh["fsdp"], c.num_sequences)  # noqa: E731
    return sorted(unordered, key=order)


def _meshes(count: int) -> Iterator[MeshConfig]:
    for tensor in TENSOR_SIZES:
        for seq in SEQ_SIZES if tensor == 1 else (1,):
            num_left = count // (tensor * seq)
            if count % (tensor * seq) == 0:
                for fsdp in (n for n in range(1, num_left + 1) if num_left % n == 0):
                    yield MeshConfig(fsdp=fsdp, seq=seq, tensor=tensor)


def _candidate(
    cfg: ExperimentConfig, target: Target, mesh: MeshConfig, remat: Remat, num_sequences: int
) -> Candidate | None:
    # Shard sequences only if one does not fit a device.
    if num_sequences > 1 and mesh.seq > 1:
        return None
    sizes = mesh.sizes(target.num_devices)
    shards = math.prod(sizes[axis] for axis in get_rules(mesh.rules_name())["batch"])
    batch_size = num_sequences * shards * cfg.train.accumulation
    candidate_cfg = dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(mesh, slstm_seq=cfg.mesh.slstm_seq),
        model=dataclasses.replace(cfg.model, remat=remat),
        data=dataclasses.replace(cfg.data, batch_size=batch_size),
    )
    try:
        estimate = estimated_plan(candidate_cfg, target)
    except ConfigError:  # the mesh does not divide a dimension
        return None
    return Candidate(candidate_cfg, estimate, num_sequences) if estimate.fits else None


def _min_bytes(candidate: Candidate, tried: list[tuple[Candidate, Plan]]) -> int:
    """Lower bound on the peak of a candidate: its estimate, plus the excess of similar ones."""
    excess = [
        (compiled.peak_bytes - other.estimate.peak_bytes)
        * min(1.0, candidate.num_sequences / other.num_sequences)
        for other, compiled in tried
        if candidate.is_similar(other)
    ]
    return candidate.estimate.peak_bytes + int(min(excess, default=0))
