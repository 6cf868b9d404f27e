"""Collectives and memory traffic, parsed from the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm_jax.plan.collectives import Collective, _first_group, collectives
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.traffic import memory_traffic
from xlstm_jax.sharding import make_mesh

LAYERS, WIDTH, BATCH = 7, 64, 16


@pytest.fixture(scope="module")
def program():
    """A loop over layers with weights sharded over four of eight devices."""
    mesh = make_mesh(data=2, fsdp=4)

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    put = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )
    weights = put((LAYERS, WIDTH, WIDTH), None, "fsdp")
    with jax.set_mesh(mesh):
        lowered = jax.jit(loss).lower(weights, put((BATCH, WIDTH), ("data", "fsdp")))
        return Program(lowered.compile().as_text())


def test_collectives_in_a_loop_count_once_per_iteration(program):
    (gather,) = (c for c in collectives(program) if c.kind == "all-gather")
    assert gather.count == LAYERS and gather.group == (0, 1, 2, 3)
    assert gather.payload == WIDTH * WIDTH * 4 and gather.bytes_sent == 0.75 * gather.payload
    (reduce,) = (c for c in collectives(program) if c.kind == "all-reduce")
    assert reduce.count == 1 and reduce.payload == 4 and len(reduce.group) == 8


def test_traffic_counts_only_the_slice_of_a_stacked_array(program):
    """Each iteration reads one layer's shard and writes and reads its all-gathered weights."""
    layer = WIDTH * WIDTH * 4
    activations = BATCH // 8 * WIDTH * 4
    lower_bound = LAYERS * (layer / 4 + 2 * layer + 2 * activations)
    assert lower_bound < memory_traffic(program) < 2 * lower_bound


@pytest.mark.parametrize(
    "text,group",
    [
        ("replica_groups={{0,4},{1,5}}, x", (0, 4)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", (0, 4)),
        ("replica_groups=[1,8]<=[8]", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
        ("dimensions={0}", ()),
    ],
)
def test_first_group_parses_all_notations(text, group):
    assert _first_group(text) == group


@pytest.mark.parametrize(
    "kind,payload,bytes_sent",
    [
        ("all-gather", 800, 700),
        ("reduce-scatter", 800, 700),
        ("all-reduce", 800, 1400),
        ("all-to-all", 800, 700),
        ("collective-permute", 800, 800),
    ],
)
def test_bytes_sent_are_those_of_a_ring(kind, payload, bytes_sent):
    collective = Collective(kind, payload, tuple(range(8)), 1, "f32")
    assert collective.bytes_sent == pytest.approx(bytes_sent)


STEP = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%scattered (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %r = bf16[16,8]{1,0} reduce-scatter(%p), replica_groups=[1,4]<=[4],
    dimensions={0}, to_apply=%add,
    frontend_attributes={kernel_metadata={
"tile":"chunk 256, 2 a block"
}}, metadata={op_name="step"}
}

%body (t: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %t = (s32[], bf16[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[16,8]{1,0} get-tuple-element(%t), index=1
  %s = (bf16[16,8]{1,0}, bf16[64,8]{1,0:T(8,128)(2,1)}) all-gather-start(%x),
    replica_groups=[1,4]<=[4], dimensions={0}
  %g = bf16[64,8]{1,0} all-gather-done(%s)
  %y = bf16[16,8]{1,0} fusion(%g), kind=kCustom, calls=%scattered
  ROOT %u = (s32[], bf16[16,8]{1,0}) tuple(%i, %y)
}

%more (t.1: (s32[], bf16[16,8])) -> pred[] {
  %t.1 = (s32[], bf16[16,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (q: bf16[16,8]) -> (s32[], bf16[16,8]) {
  %q = bf16[16,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[16,8]{1,0}) tuple(%zero, %q)
  ROOT %w = (s32[], bf16[16,8]{1,0}) while(%init), condition=%more, body=%body,
    backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_asynchronous_and_fused_collectives_count_once():
    """In the HLO of compilers for accelerators, where an instruction may have several lines."""
    by_kind = {c.kind: c for c in collectives(Program(STEP))}
    assert set(by_kind) == {"all-gather", "reduce-scatter"}
    assert all(c.payload == 64 * 8 * 2 and c.count == 5 for c in by_kind.values())
    shard, full = 16 * 8 * 2, 64 * 8 * 2  # each written and read once per iteration
    assert memory_traffic(Program(STEP)) == 5 * 2 * (shard + full)
    update = "  %new = bf16[64,8]{1,0} dynamic-update-slice(%g, %x, %i, %i)\n"
    text = STEP.replace("  %y = ", update + "  %y = ")
    assert memory_traffic(Program(text)) == 5 * 2 * (shard + full + shard)


def test_prefetched_arrays_are_read_once():
    """S(1) is on-chip memory of a TPU, whose traffic is not counted."""
    prefetch = """  %f = (bf16[64,8]{1,0}, bf16[64,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%g)
  %part = ((bf16[64,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%g), slice={[0:16]}
  %done = bf16[16,8]{1,0:S(1)} slice-done(%part)
"""
    shard, full = 16 * 8 * 2, 64 * 8 * 2
    before = memory_traffic(Program(STEP))
    text = STEP.replace("  %y = ", prefetch + "  %y = ")
    assert memory_traffic(Program(text)) - before == 5 * (full + shard)
    to_hbm = text.replace("bf16[16,8]{1,0:S(1)}, s32", "bf16[16,8]{1,0}, s32")
    assert memory_traffic(Program(to_hbm)) - before == 5 * (full + 2 * shard)


def test_trip_count_is_read_from_the_loop_condition():
    """In the HLO of compilers for TPUs, which has no trip count annotation."""
    text = STEP.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    text = text.replace(',\n    backend_config={"known_trip_count":{"n":"5"}}', "")
    condition = """  %n = s32[]{:T(128)} constant(5)
  %j = s32[] get-tuple-element(%t.1), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT"""
    counted = text.replace("  ROOT %true = pred[] constant(true)", condition)
    assert "known_trip_count" not in counted
    assert {c.count for c in collectives(Program(counted))} == {5}
    # Unrolled by two: three iterations cover five steps.
    pairs = "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n  ROOT %u = (s32[]"
    unrolled = counted.replace("  ROOT %u = (s32[]", pairs).replace(
        "tuple(%i, %y)", "tuple(%next, %y)"
    )
    assert {c.count for c in collectives(Program(unrolled))} == {3}
    with pytest.raises(ValueError, match="loop 'w' must have a known trip count"):
        _ = Program(text).execution_counts


def test_an_all_gather_split_over_several_fusions_counts_once():
    """Its parts share a channel id. Separate reductions may share one too, and count separately."""
    second = "  %again = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), channel_id=7,"
    second += " replica_groups=[1,4]<=[4], dimensions={0}\n"
    single = STEP.replace("all-gather-start(%x),", "all-gather-start(%x), channel_id=7,")
    split = single.replace("  %g = ", second + "  %g = ")
    assert len(collectives(Program(split))) == len(collectives(Program(single))) == 2
    reduction = STEP.replace("reduce-scatter(%p),", "reduce-scatter(%p), channel_id=7,")
    fusion = "  %z = bf16[16,8]{1,0} fusion(%g), kind=kCustom, calls=%scattered\n"
    reductions = reduction.replace("  ROOT %u = (s32[]", fusion + "  ROOT %u = (s32[]")
    assert {c.count for c in collectives(Program(reductions))} == {5, 10}


def test_a_collective_that_overlaps_a_loop_counts_once():
    """It starts before the loop or ends after it; each iteration fuses a part of it with other
    computation."""
    part = """%part (p.9: bf16[16,8]) -> bf16[64,8] {
  %p.9 = bf16[16,8]{1,0} parameter(0)
  ROOT %g.9 = bf16[64,8]{1,0} all-gather(%p.9), channel_id=9, replica_groups=[1,4]<=[4]
}

"""
    text = STEP.replace("%body (", part + part.replace("part", "begin") + "%body (")
    text = text.replace("  %y = ", "  %v = bf16[64,8]{1,0} fusion(%x), calls=%part\n  %y = ")
    once = "  %once = bf16[64,8]{1,0} fusion(%q), calls=%begin\n"
    before = text.replace("  %init = ", once + "  %init = ")
    loop = text.index("  ROOT %w = ")
    after = text[:loop] + text[loop:].replace("}}\n}", "}}\n" + once + "}")
    for program in (before, after):
        assert sorted(c.count for c in collectives(Program(program))) == [1, 5, 5]


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    """In the HLO of compilers for TPUs."""
    fused = """  %sum = bf16[64,8]{1,0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  %zero.9 = s32[] constant(0)
  ROOT %r = bf16[16,8]{1,0} dynamic-slice(%sum, %zero.9, %zero.9), dynamic_slice_sizes={16,8}
}

%body ("""
    reduce_scatter = STEP[STEP.index("  ROOT %r = ") : STEP.index("%body (") + len("%body (")]
    (reduction,) = (
        c
        for c in collectives(Program(STEP.replace(reduce_scatter, fused)))
        if c.count == 5 and c.kind != "all-gather"
    )
    assert (reduction.kind, reduction.payload) == ("reduce-scatter", 64 * 8 * 2)


def test_sends_to_the_host_are_collectives_between_slices():
    """In the HLO of compilers for several TPU slices."""
    send = """  %out = (bf16[16,8]{1,0}, u32[], token[]) send(%x, %i), channel_id=4,
    frontend_attributes={_xla_megascale_target="{1,3:5}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""
    all_collectives = collectives(Program(STEP.replace("  %y = ", send + "  %y = ")))
    (cross_slice,) = (c for c in all_collectives if c.kind == "all-reduce")
    assert (cross_slice.payload, cross_slice.count) == (16 * 8 * 2, 5)
    assert cross_slice.group == (0, 16, 32, 48)
