"""What formulas say of runs, and the search for the best that fits; nothing is compiled."""

import dataclasses

import pytest

from pallas_kernels.hardware import GPUS, TPUS
from xlstm_jax.cli.options import with_preset
from xlstm_jax.config import ConfigError
from xlstm_jax.flops import count_params
from xlstm_jax.modules import LargeConfig, LMConfig
from xlstm_jax.plan import Target, find_target, search
from xlstm_jax.plan.activations import kept_for_backward, kept_per_row
from xlstm_jax.plan.formula import estimate
from xlstm_jax.plan.report import plan
from xlstm_jax.sharding import MeshConfig

SMALL = LMConfig(
    vocab_size=512, dim=256, pattern="MMMM", large=LargeConfig(num_heads=4), dtype="bfloat16"
)


ALONE = MeshConfig()


def config(mesh=ALONE, batch_size=8, seq_len=256, **model):
    cfg = with_preset("scaling_160m")
    data = dataclasses.replace(cfg.data, batch_size=batch_size, seq_len=seq_len)
    return dataclasses.replace(cfg, model=dataclasses.replace(SMALL, **model), data=data, mesh=mesh)


def target(count=8, memory=2**30, kind="H100", near=8):
    """Chips that no compiler here knows."""
    chip = (GPUS if kind in GPUS else TPUS)[kind]._replace(hbm_bytes=memory)
    return Target(f"{kind}:test", chip, (), count, count, near, "for the test")


def sizes(**given):
    return {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1} | given


def test_what_rows_keep_grows_with_them_and_what_weights_keep_does_not():
    each, copies = kept_per_row(config(remat="full"))
    many = config(batch_size=6, remat="full")
    assert kept_for_backward(many) == 6 * each + copies
    # At least the input of every block, in bfloat16.
    assert each >= 4 * 256 * 256 * 2
    assert kept_per_row(config(remat="none"))[0] > 4 * each


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_gathered_twice_and_gradients_scattered_once(tied):
    cfg = config(MeshConfig(fsdp=4), tie_embeddings=tied)
    found = estimate(cfg, target(), sizes(fsdp=4))
    tables = (1 if tied else 2) * 512 * 256
    blocks = count_params(cfg.model) - tables
    assert found.sent["all-gather"] == pytest.approx(0.75 * (4 * blocks + 2 * tables), rel=0.01)
    assert found.sent["reduce-scatter"] == pytest.approx(0.75 * (2 * blocks + 4 * tables), rel=0.01)
    assert "all-reduce" not in found.sent


def test_every_micro_batch_gathers_and_scatters_but_tables_are_added_up_once():
    cfg = config(MeshConfig(fsdp=4))
    twice = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    one, two = (estimate(c, target(), sizes(fsdp=4)).sent for c in (cfg, twice))
    assert two["all-gather"] == 2 * one["all-gather"]
    tables = 0.75 * 2 * 512 * 256 * 4
    assert two["reduce-scatter"] - tables == pytest.approx(2 * (one["reduce-scatter"] - tables))


def test_cut_features_are_added_up_forward_backward_and_again():
    mesh = MeshConfig(tensor=2)
    sent = [
        estimate(config(mesh, remat=remat), target(2), sizes(tensor=2)).sent["all-reduce"]
        for remat in ("none", "full")
    ]
    positions = 8 * 256
    # Outputs of cells and of the feed-forward part of four blocks, in bfloat16, around a ring.
    assert sent[0] == 2 * 0.5 * 2 * 2 * 4 * positions * 256 * 2
    assert sent[1] == 1.5 * sent[0]
    alone = estimate(config(mesh, pattern="mmmm"), target(2), sizes(tensor=2)).sent["all-reduce"]
    assert alone == sent[0] / 2  # no feed-forward part


def test_cut_time_exchanges_the_memory_of_every_span_three_times():
    """Matrices of four layers with four heads, in float32."""
    found = estimate(config(MeshConfig(seq=4), batch_size=4), target(4), sizes(seq=4))
    keys, values, _ = config().model.large.widths(256)
    state = 4 * 4 * ((keys // 4) * (values // 4) + keys // 4 + 1) * 4  # C, n and m
    assert found.sent["all-gather"] == 3 * 3 * 4 * state
    cfg = config(MeshConfig(seq=4), batch_size=4, pattern="mmms")  # an sLSTM shares no sequence
    width, heads = cfg.model.mlstm.width(256), cfg.model.mlstm.num_heads
    found = estimate(cfg, target(4), sizes(seq=4))
    conv = 3 * width * 2  # bfloat16
    state = heads * ((width // heads) ** 2 + width // heads + 1) * 4 + conv
    assert found.sent["all-gather"] == 3 * 3 * 4 * 3 * state


def test_parts_of_gradients_are_added_up_along_data():
    alone = estimate(config(MeshConfig(fsdp=4)), target(4), sizes(fsdp=4)).sent
    twice = estimate(config(MeshConfig(fsdp=4)), target(), sizes(data=2, fsdp=4)).sent
    assert twice["all-reduce"] == pytest.approx(alone["reduce-scatter"] / 3)
    assert twice["all-gather"] == alone["all-gather"]


def test_all_chips_of_a_slice_add_up_whole_gradients():
    """As libtpu compiles it."""
    whole = estimate(config(MeshConfig(fsdp=32)), target(32, kind="v5e", near=32), sizes(fsdp=32))
    half = estimate(
        config(MeshConfig(fsdp=32)), target(64, kind="v5e", near=64), sizes(data=2, fsdp=32)
    )
    assert "reduce-scatter" not in whole.sent
    assert whole.sent["all-reduce"] == pytest.approx(2 * half.sent["reduce-scatter"])
    few = estimate(config(MeshConfig(fsdp=16)), target(16, kind="v5e", near=16), sizes(fsdp=16))
    assert "reduce-scatter" in few.sent


def test_exchanges_between_hosts_take_the_slower_network():
    near = estimate(config(MeshConfig(fsdp=8)), target(8), sizes(fsdp=8))
    far = estimate(config(MeshConfig(fsdp=8)), target(8, near=4), sizes(fsdp=8))
    chip = GPUS["H100"]
    assert far.sent == near.sent
    assert far.network_seconds / near.network_seconds == pytest.approx(
        chip.intra_bandwidth / chip.inter_bandwidth
    )


@pytest.mark.parametrize("axis", ["seq", "tensor"])
def test_cut_spans_and_cut_features_are_paid_for(axis):
    mesh = MeshConfig(**{axis: 2})
    alone = estimate(config(), target(4), sizes(data=4))
    cut = estimate(config(mesh), target(4), sizes(data=2, **{axis: 2}))
    assert cut.sent != alone.sent and cut.network_seconds > 0


def test_a_plan_without_a_compiler_says_so_and_gives_what_is_certain():
    found = plan(config(MeshConfig(fsdp=4)), target())
    assert found.refusal == "for the test" and found.compile_seconds == 0
    assert set(found.seconds) == {"compute", "network"}
    assert found.held_bytes > 4 * found.params_bytes
    assert found.mesh == sizes(data=2, fsdp=4)
    spans = plan(config(MeshConfig(fsdp=2, seq=2), batch_size=8), target(4))
    rows = plan(config(MeshConfig(fsdp=4), batch_size=8), target(4))
    assert spans.activations_bytes == rows.activations_bytes
    with pytest.raises(ConfigError, match="data.batch_size must be a multiple of 8"):
        plan(config(MeshConfig(fsdp=4), batch_size=9), target())


def test_where_everything_fits_devices_share_nothing():
    best, found = search.fit(config(), target(memory=2**40))
    assert best.sizes == sizes(data=8) and best.cfg.model.remat == "none"
    assert best.rows == max(search.ROWS) and best.cfg.data.batch_size == 8 * best.rows
    assert found.fits


def test_candidates_come_fastest_first_and_could_fit():
    found = search.candidates(config(), target(memory=100 * 2**20))
    rates = [candidate.tokens_per_second for candidate in found]
    assert rates == sorted(rates, reverse=True) and len(rates) > 10
    assert all(candidate.least_bytes <= 100 * 2**20 for candidate in found)
    assert {c.cfg.model.remat for c in found} == {"dots", "full", "none"}
    assert {c.sizes["tensor"] for c in found} > {1, 2}


def test_candidates_keep_what_is_not_searched():
    """Micro-batches, and what sLSTM layers do with cut time; a row is shared only on its own."""
    cfg = config(MeshConfig(slstm_seq="refuse"))
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    for one in search.candidates(cfg, target(memory=2**33)):
        assert one.cfg.mesh.slstm_seq == "refuse" and one.cfg.train.accumulation == 2
        shares = one.sizes["data"] * one.sizes["fsdp"]
        assert one.cfg.data.batch_size == 2 * shares * one.rows
        assert one.rows == 1 or one.sizes["seq"] == 1


def test_what_a_compiler_took_beyond_the_formula_counts_for_others_of_its_kind():
    """In proportion to the rows, as far as they are fewer."""
    best, found = search.fit(config(), target(memory=2**40))
    beyond = dataclasses.replace(found, held_bytes=best.least_bytes + 4096)
    fewer = dataclasses.replace(best, rows=best.rows // 4)
    more = dataclasses.replace(best, rows=4 * best.rows)
    cut = dataclasses.replace(best, sizes=best.sizes | {"tensor": 2})
    model = dataclasses.replace(best.cfg.model, remat="full")
    other = dataclasses.replace(best, cfg=dataclasses.replace(best.cfg, model=model))
    needs = [search._least(c, [(best, beyond)]) for c in (best, fewer, more, cut, other)]
    assert [n - best.least_bytes for n in needs] == [4096, 1024, 4096, 0, 0]


def compiled(monkeypatch, held):
    """Plans as a compiler that needs `held(candidate)` would have them; returns what was asked."""
    asked = []

    def told(cfg, target):
        found = plan(cfg, target)
        asked.append((cfg.model.remat, cfg.data.batch_size // 8, dict(found.mesh)))
        return dataclasses.replace(found, held_bytes=held(found, cfg))

    monkeypatch.setattr(search, "plan", told)
    return asked


def test_what_does_not_fit_as_compiled_is_passed_over(monkeypatch):
    """A compiler that takes 60 MiB more than formulas say."""
    chips, told = target(memory=200 * 2**20), []
    asked = compiled(monkeypatch, lambda found, cfg: found.held_bytes + 60 * 2**20)
    best, found = search.fit(config(), chips, tell=lambda candidate, plan: told.append(plan))
    assert found.fits and found.held_bytes <= 200 * 2**20
    assert len(told) == len(asked) >= 2 and not any(plan.fits for plan in told[:-1])
    before = search.candidates(config(), chips)
    assert before.index(best) > len(asked)  # most of what cannot fit was not compiled


def test_what_fits_nowhere_is_refused_with_what_the_smallest_needs(monkeypatch):
    monkeypatch.setattr(search, "MOST_COMPILED", 2)
    compiled(monkeypatch, lambda found, cfg: 3 * 2**30)
    with pytest.raises(ConfigError, match=r"has no room for this run.*the smallest needs 3.0 GiB"):
        search.fit(config(), target())
    with pytest.raises(ConfigError, match="0 were compiled and none fits"):
        search.fit(config(), target(memory=2**20))


def test_slices_are_of_tpus():
    with pytest.raises(ConfigError, match="slices=2 must be 1, or more of a TPU"):
        find_target("h100:2x8", slices=2)
    with pytest.raises(ConfigError, match="slices=0"):
        find_target("v5e:4x4", slices=0)


def test_a_plan_knows_its_limit():
    found = plan(config(), target())
    slow = dataclasses.replace(found, seconds={"compute": 1.0, "memory": 3.0})
    assert (slow.limit, slow.step_seconds, slow.fits) == ("memory", 3.0, True)
    assert not dataclasses.replace(found, memory_bytes=1).fits
