"""The best mesh, rematerialisation and batch per device for a run on given hardware."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from xlstm_jax.config import ConfigError
from xlstm_jax.plan.activations import cuts_of_batch, kept_per_row
from xlstm_jax.plan.formula import estimate
from xlstm_jax.plan.report import Plan, compute_seconds, plan
from xlstm_jax.plan.topology import Target
from xlstm_jax.sharding import MeshConfig, get_rules
from xlstm_jax.train.config import ExperimentConfig, check_lengths

POLICIES = ("none", "dots", "full")
"""Of rematerialisation. "names" keeps what "full" has to keep as well where blocks are looped over;
"offload" moves it to a host whose rate nobody knows."""

ROWS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Of a micro-batch on each device."""

TENSOR = (1, 2, 4, 8)
SEQ = (1, 2, 4, 8, 16)

MOST_COMPILED = 24


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run, and what formulas say of it."""

    cfg: ExperimentConfig
    sizes: dict[str, int]
    rows: int  # of a micro-batch on each device
    tokens_per_second: float  # computing and exchanging one after the other
    least_bytes: int  # state, gradients and what is kept for the backward pass


def fit(
    cfg: ExperimentConfig,
    target: Target,
    *,
    tell: Callable[[Candidate, Plan], None] = lambda candidate, found: None,
) -> tuple[Candidate, Plan]:
    """The fastest run of this model and length that fits, with its plan.

    Candidates are ordered by what formulas allow, computing and exchanging one after the other. In
    this order they are compiled, except those that cannot fit by what was compiled before, until
    one does fit: the batch is as large as it makes the step better.

    Args:
        cfg: its mesh, rematerialisation and batch size are replaced; all else stays.
        tell: called with everything that was compiled.

    Raises:
        ConfigError: nothing fits.
    """
    tried: list[tuple[Candidate, Plan]] = []
    for candidate in candidates(cfg, target):
        if _least(candidate, tried) > target.chip.hbm_bytes:
            continue
        found = plan(candidate.cfg, target)
        tell(candidate, found)
        if found.fits:
            return candidate, found
        tried.append((candidate, found))
        if len(tried) == MOST_COMPILED:
            break
    nearest = min((p.held_bytes for _, p in tried), default=None)
    needs = "" if nearest is None else f"; the smallest needs {nearest / 2**30:.1f} GiB"
    raise ConfigError(
        f"topology={target.name!r} has no room for this run: of its meshes, {len(tried)} were "
        f"compiled and none fits {target.chip.hbm_bytes / 2**30:.1f} GiB a device{needs}; use more "
        "chips, a shorter data.seq_len or a smaller model."
    )


def candidates(cfg: ExperimentConfig, target: Target) -> list[Candidate]:
    """All that could be and might fit, the fastest by formula first."""
    kept = functools.cache(functools.partial(_kept, cfg, target))
    found = [
        candidate
        for mesh in _meshes(target.num_devices)
        for remat in POLICIES
        for rows in ROWS
        if (candidate := _candidate(cfg, target, mesh, remat, rows, kept)) is not None
    ]
    # Of equals the one with the shortest groups, then the smallest batch.
    found.sort(key=lambda c: (-c.tokens_per_second, c.sizes["fsdp"], c.rows))
    return found


def _meshes(count: int) -> Iterator[MeshConfig]:
    for tensor in TENSOR:
        for seq in SEQ if tensor == 1 else (1,):
            rest = count // (tensor * seq)
            if count % (tensor * seq) == 0:
                for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
                    yield MeshConfig(fsdp=fsdp, seq=seq, tensor=tensor)


def _candidate(cfg, target, mesh, remat, rows, kept) -> Candidate | None:
    sizes = mesh.sizes(target.num_devices)
    rules = get_rules(mesh.rules_name())
    shares = math.prod(sizes[axis] for axis in rules["batch"])
    # A row that several devices share is for rows that one has no room for.
    if rows > 1 and sizes["seq"] > 1:
        return None
    batch = rows * shares * cfg.train.accumulation
    changed = dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(mesh, slstm_seq=cfg.mesh.slstm_seq),
        model=dataclasses.replace(cfg.model, remat=remat),
        data=dataclasses.replace(cfg.data, batch_size=batch),
    )
    try:
        check_lengths(changed, rules, sizes)
    except ConfigError:
        return None
    found = estimate(changed, target, sizes)
    least = 2 * found.params_bytes + found.optimizer_bytes
    cut = cuts_of_batch(rules, sizes) * sizes["tensor"]
    each, copies = kept(remat)
    least += each * rows * shares // cut + copies // (sizes["fsdp"] * sizes["tensor"])
    if least > target.chip.hbm_bytes:
        return None
    seconds = compute_seconds(changed, target) + found.network_seconds
    return Candidate(changed, sizes, rows, batch * cfg.data.seq_len / seconds, least)


def _kept(cfg: ExperimentConfig, target: Target, remat: str) -> tuple[int, int]:
    changed = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))
    with target.compiling():
        return kept_per_row(changed)


def _least(candidate: Candidate, tried: list[tuple[Candidate, Plan]]) -> int:
    """Bytes that a candidate needs by what others of its kind took beyond their formula."""
    beyond = [
        (found.held_bytes - other.least_bytes) * min(1.0, candidate.rows / other.rows)
        for other, found in tried
        if other.cfg.model.remat == candidate.cfg.model.remat
        and other.sizes["tensor"] == candidate.sizes["tensor"]
        and other.sizes["seq"] == candidate.sizes["seq"]
    ]
    return candidate.least_bytes + int(min(beyond, default=0))
