"""Plans of sweeps: ids, budgets, rules, and refused plans."""

import dataclasses

import pytest

from tests.scaling.sweeps import llama, sweep, xlstm
from xlstm_jax import flops
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules import LMConfig
from xlstm_jax.scaling import Shape, plan


def test_plan_is_deterministic_and_has_a_run_per_combination():
    specs = plan(sweep(seeds=(0, 1)))
    assert specs == plan(sweep(seeds=(0, 1)))
    assert len(specs) == len({spec.run_id for spec in specs}) == 2 * 2 * 2 * 2


def test_ids_are_stable():
    """They name folders that exist: a changed hash would train everything again."""
    spec = plan(sweep())[0]
    assert spec.cfg.name == "xlstm_d16_l1_h2_T32_C1e+09_s0"
    assert spec.run_id == "cf8682953e16"


def test_id_depends_on_every_field_but_the_name():
    base = {spec.cfg.name: spec.run_id for spec in plan(sweep())}
    train = dataclasses.replace(sweep().train, eps=1e-7)
    other = {spec.cfg.name: spec.run_id for spec in plan(sweep(train=train))}
    assert base.keys() == other.keys() and not set(base.values()) & set(other.values())
    renamed = plan(sweep(families={"mlstm": xlstm, "llama": llama}))
    assert [spec.run_id for spec in renamed] == list(base.values())


def test_record_has_the_columns_of_a_table_before_training():
    spec = plan(sweep())[-1]
    record = spec.record()
    model, steps = spec.cfg.model, spec.cfg.train.steps
    assert record["num_params"] == flops.count_params(model)
    assert record["train_tokens"] == steps * 4 * 32
    assert record["train_flops"] == pytest.approx(
        steps * 4 * flops.train_flops(model, 32), rel=1e-12
    )
    assert record["tokens_per_param"] == pytest.approx(
        record["train_tokens"] / record["num_params"]
    )
    expected = dict(model="llama", isoflop=3e9, embedding_dim=24, num_blocks=1, context_length=32)
    expected |= dict(learning_rate=2e-3, batch_size=4, seed=0, steps=steps, vocab_size=257)
    assert {name: record[name] for name in expected} == expected


def test_every_run_is_near_its_budget():
    for spec in plan(sweep()):
        assert spec.isoflop is not None
        assert spec.train_flops == pytest.approx(spec.isoflop, rel=0.1)


def test_ratios_of_tokens_to_parameters_replace_budgets():
    for spec in plan(sweep(budgets=(), tokens_per_param=(2, 5))):
        ratio = spec.train_tokens / spec.num_params
        assert spec.isoflop is None and min(abs(ratio / 2 - 1), abs(ratio / 5 - 1)) < 0.01


def test_steps_are_rounded_to_the_multiple():
    specs = plan(sweep(step_multiple=10))
    assert all(spec.cfg.train.steps % 10 == 0 for spec in specs)
    with pytest.raises(
        ArgumentError, match="must be a multiple of step_multiple=500 within 10% of"
    ):
        plan(sweep(step_multiple=500))


def test_rules_see_family_length_and_budget():
    specs = plan(
        sweep(
            seq_len=(16, 32),
            batch_rule=lambda point: 128 // point.seq_len,
            lr_rule=lambda point: 1e-3 if point.family == "llama" else 2e-3,
            include=lambda point: point.budget == 1e9 or point.family == "xlstm",
        )
    )
    assert {spec.cfg.data.batch_size * spec.cfg.data.seq_len for spec in specs} == {128}
    assert {(spec.model, spec.cfg.train.lr) for spec in specs} == {("llama", 1e-3), ("xlstm", 2e-3)}
    assert {(spec.model, spec.isoflop) for spec in specs} == {
        ("llama", 1e9), ("xlstm", 1e9), ("xlstm", 3e9)
    }  # fmt: skip


def test_each_family_may_have_its_own_shapes():
    shapes = {"xlstm": [Shape(16, 1, 2)], "llama": [Shape(24, 1, 2), Shape(32, 1, 2)]}
    dims = [(spec.model, spec.cfg.model.dim) for spec in plan(sweep(shapes=shapes, budgets=[1e9]))]
    assert dims == [("xlstm", 16), ("llama", 24), ("llama", 32)]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(families={}), "families must not be empty"),
        (dict(budgets=()), "budgets and tokens_per_param must not both be empty"),
        (dict(budgets=[0.0]), "budgets must be above 0, got 0.0"),
        (dict(shapes={"xlstm": [Shape(16, 1, 2)]}), "shapes must have an entry for each of xlstm,"),
        (dict(train=dataclasses.replace(sweep().train, eval_every=0)), "eval_every must be at lea"),
        (dict(include=lambda point: False), "include must be True for at least one run"),
        (dict(shapes=[Shape(16, 1, 2)] * 2), "have equal configs"),
        (dict(budgets=[1e9, 1.0001e9]), "have equal configs"),
        (dict(batch_rule=lambda point: 2.5), "batch_rule must return an integer of at least 1"),
    ],
)
def test_invalid_sweeps_are_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        plan(sweep(**changes))


def test_error_of_a_family_is_that_of_its_config():
    with pytest.raises(ArgumentError, match="pattern"):
        plan(sweep(families={"x": lambda shape: LMConfig(vocab_size=9, dim=8, pattern="")}))
