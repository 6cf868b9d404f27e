"""What devices exchange, and what they read and write, off the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm_jax.plan.collectives import Collective, _group, collectives
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.traffic import memory_traffic
from xlstm_jax.sharding import make_mesh

LAYERS, WIDTH, ROWS = 7, 64, 16


@pytest.fixture(scope="module")
def program():
    """A loop over layers whose weights are cut over four of eight devices."""
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
        lowered = jax.jit(loss).lower(weights, put((ROWS, WIDTH), ("data", "fsdp")))
        return Program(lowered.compile().as_text())


def test_what_a_loop_exchanges_counts_as_often_as_it_runs(program):
    (gather,) = (c for c in collectives(program) if c.kind == "all-gather")
    assert gather.times == LAYERS and gather.group == (0, 1, 2, 3)
    assert gather.payload == WIDTH * WIDTH * 4 and gather.sent == 0.75 * gather.payload
    (reduce,) = (c for c in collectives(program) if c.kind == "all-reduce")
    assert reduce.times == 1 and reduce.payload == 4 and len(reduce.group) == 8


def test_a_slice_of_a_stack_is_not_the_whole_of_it(program):
    """Every step of the loop reads the weights of one layer, and writes and reads them gathered."""
    layer = WIDTH * WIDTH * 4
    rows = ROWS // 8 * WIDTH * 4
    least = LAYERS * (layer / 4 + 2 * layer + 2 * rows)
    assert least < memory_traffic(program) < 2 * least


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
def test_groups_are_read_in_every_spelling(text, group):
    assert _group(text) == group


@pytest.mark.parametrize(
    "kind,payload,sent",
    [
        ("all-gather", 800, 700),
        ("reduce-scatter", 800, 700),
        ("all-reduce", 800, 1400),
        ("all-to-all", 800, 700),
        ("collective-permute", 800, 800),
    ],
)
def test_a_ring_sends_what_it_must(kind, payload, sent):
    assert Collective(kind, payload, tuple(range(8)), 1, "f32").sent == pytest.approx(sent)


STARTED = """HloModule step

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


def test_what_is_started_early_or_fused_counts_once():
    """As compilers for accelerators write it, in several lines where there is much to say."""
    found = {c.kind: c for c in collectives(Program(STARTED))}
    assert set(found) == {"all-gather", "reduce-scatter"}
    assert all(c.payload == 64 * 8 * 2 and c.times == 5 for c in found.values())
    piece, whole = 16 * 8 * 2, 64 * 8 * 2  # each written once and read once in every step
    assert memory_traffic(Program(STARTED)) == 5 * 2 * (piece + whole)
    update = "  %new = bf16[64,8]{1,0} dynamic-update-slice(%g, %x, %i, %i)\n"
    text = STARTED.replace("  %y = ", update + "  %y = ")
    assert memory_traffic(Program(text)) == 5 * 2 * (piece + whole + piece)


def test_what_is_fetched_early_is_read_once():
    """S(1) is memory on a TPU's chip, which is not counted."""
    fetch = """  %f = (bf16[64,8]{1,0}, bf16[64,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%g)
  %part = ((bf16[64,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%g), slice={[0:16]}
  %done = bf16[16,8]{1,0:S(1)} slice-done(%part)
"""
    piece, whole = 16 * 8 * 2, 64 * 8 * 2
    before = memory_traffic(Program(STARTED))
    text = STARTED.replace("  %y = ", fetch + "  %y = ")
    assert memory_traffic(Program(text)) - before == 5 * (whole + piece)
    away = text.replace("bf16[16,8]{1,0:S(1)}, s32", "bf16[16,8]{1,0}, s32")
    assert memory_traffic(Program(away)) - before == 5 * (whole + 2 * piece)


def test_a_loop_whose_length_only_its_condition_tells_is_counted():
    """As compilers for TPUs write it."""
    text = STARTED.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    text = text.replace(',\n    backend_config={"known_trip_count":{"n":"5"}}', "")
    condition = """  %n = s32[]{:T(128)} constant(5)
  %j = s32[] get-tuple-element(%t.1), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT"""
    counted = text.replace("  ROOT %true = pred[] constant(true)", condition)
    assert "known_trip_count" not in counted
    assert {c.times for c in collectives(Program(counted))} == {5}
    # Two steps at a time, the last one alone.
    pairs = "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n  ROOT %u = (s32[]"
    unrolled = counted.replace("  ROOT %u = (s32[]", pairs).replace(
        "tuple(%i, %y)", "tuple(%next, %y)"
    )
    assert {c.times for c in collectives(Program(unrolled))} == {3}
    with pytest.raises(ValueError, match="the loop w does not say how often it runs"):
        _ = Program(text).times


def test_an_exchange_spread_over_several_fusions_is_one():
    """They have its channel in common; sums of several arrays may have, too, and are several."""
    again = "  %again = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), channel_id=7,"
    again += " replica_groups=[1,4]<=[4], dimensions={0}\n"
    one = STARTED.replace("all-gather-start(%x),", "all-gather-start(%x), channel_id=7,")
    twice = one.replace("  %g = ", again + "  %g = ")
    assert len(collectives(Program(twice))) == len(collectives(Program(one))) == 2
    scattered = STARTED.replace("reduce-scatter(%p),", "reduce-scatter(%p), channel_id=7,")
    fusion = "  %z = bf16[16,8]{1,0} fusion(%g), kind=kCustom, calls=%scattered\n"
    sums = scattered.replace("  ROOT %u = (s32[]", fusion + "  ROOT %u = (s32[]")
    assert {c.times for c in collectives(Program(sums))} == {5, 10}


def test_an_exchange_that_lasts_through_a_loop_runs_once():
    """It begins before the loop and ends after it; in every step other work is fused with a part of
    it."""
    part = """%part (p.9: bf16[16,8]) -> bf16[64,8] {
  %p.9 = bf16[16,8]{1,0} parameter(0)
  ROOT %g.9 = bf16[64,8]{1,0} all-gather(%p.9), channel_id=9, replica_groups=[1,4]<=[4]
}

"""
    text = STARTED.replace("%body (", part + part.replace("part", "begin") + "%body (")
    text = text.replace("  %y = ", "  %v = bf16[64,8]{1,0} fusion(%x), calls=%part\n  %y = ")
    once = "  %once = bf16[64,8]{1,0} fusion(%q), calls=%begin\n"
    before = text.replace("  %init = ", once + "  %init = ")
    loop = text.index("  ROOT %w = ")
    after = text[:loop] + text[loop:].replace("}}\n}", "}}\n" + once + "}")
    for program in (before, after):
        assert sorted(c.times for c in collectives(Program(program))) == [1, 5, 5]


def test_a_sum_and_the_slice_that_a_device_keeps_are_one_exchange():
    """As compilers for TPUs write a sum that every device needs a part of."""
    kept = """  %sum = bf16[64,8]{1,0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  %zero.9 = s32[] constant(0)
  ROOT %r = bf16[16,8]{1,0} dynamic-slice(%sum, %zero.9, %zero.9), dynamic_slice_sizes={16,8}
}

%body ("""
    whole = STARTED[STARTED.index("  ROOT %r = ") : STARTED.index("%body (") + len("%body (")]
    (sums,) = (
        c
        for c in collectives(Program(STARTED.replace(whole, kept)))
        if c.times == 5 and c.kind != "all-gather"
    )
    assert (sums.kind, sums.payload) == ("reduce-scatter", 64 * 8 * 2)


def test_what_crosses_slices_goes_through_the_host():
    """As compilers for several slices of TPUs write it."""
    send = """  %out = (bf16[16,8]{1,0}, u32[], token[]) send(%x, %i), channel_id=4,
    frontend_attributes={_xla_megascale_target="{1,3:5}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""
    found = collectives(Program(STARTED.replace("  %y = ", send + "  %y = ")))
    (far,) = (c for c in found if c.kind == "all-reduce")
    assert (far.payload, far.group, far.times) == (16 * 8 * 2, (0, 16, 32, 48), 5)
