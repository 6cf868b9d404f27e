"""Heads and directions: what their outputs depend on, and losses that fit the train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules.models import config, perturbed
from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch, pad_batch
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.directions import BidirectionalBackbone, ScanBackbone, reversed_order
from xlstm_jax.modules.heads import Classifier, PositionHead
from xlstm_jax.ops.pool import document_means
from xlstm_jax.train import TrainConfig, head_losses
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import init_state
from xlstm_jax.train.step import make_train_step

B, T, C, D = 2, 6, 3, 16
CFG = config("l")  # an LSTM, which compiles fast
IDS = jnp.asarray([[1] * T, [1, 1, 1, 1, 0, 0]])
ORDERS = ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0))


def variables(module, x):
    return {"params": perturbed(module.init(jax.random.key(0), x)["params"])}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)


@pytest.fixture
def vectors(rng):
    return jnp.asarray(rng.standard_normal((B, T, C)), jnp.float32)


# Pooling and orders.


def test_means_of_documents_leave_out_padding(x):
    means = document_means(x, IDS)
    np.testing.assert_allclose(means[0, 0], x[0].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(means[1, 0], x[1, :4].mean(axis=0), atol=1e-6)
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [2] * T])
    means = document_means(x, ids, 2)
    np.testing.assert_allclose(means[0, 1], x[0, 2:5].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(means[1, 0], np.zeros(D))  # no such document


def test_reversal_is_its_own_inverse_and_leaves_padding_at_the_end():
    order = reversed_order(IDS)
    assert order.tolist() == [[5, 4, 3, 2, 1, 0], [3, 2, 1, 0, 4, 5]]
    assert jnp.take_along_axis(order, order, axis=1).tolist() == [list(range(T))] * 2


# Directions.


@pytest.mark.slow
def test_the_two_directions_exchange_roles_when_the_sequence_is_reversed(x):
    module = BidirectionalBackbone(CFG)
    params = variables(module, x)["params"]
    y = module.apply({"params": params}, x)
    half = D
    kernel = params["merge"]["kernel"]
    exchanged = {
        "forward": params["backward"],
        "backward": params["forward"],
        "merge": {"kernel": jnp.concatenate([kernel[half:], kernel[:half]])},
    }
    mirrored = module.apply({"params": exchanged}, x[:, ::-1])
    np.testing.assert_allclose(mirrored, y[:, ::-1], atol=1e-5)


@pytest.mark.slow
def test_both_directions_see_all_of_the_document_and_nothing_else(x):
    module = BidirectionalBackbone(CFG)
    params = variables(module, x)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
    y = module.apply(params, x, ids)
    changed = module.apply(params, x.at[0, 1].add(1).at[1, 5].add(1), ids)
    difference = np.abs(np.asarray(changed - y)).max(axis=-1)
    assert (difference[0, :3] > 1e-4).all() and (difference[0, 3:] == 0).all()
    assert (difference[1, :4] == 0).all()  # padding plays no role
    alone = module.apply(params, x[:1, 3:])
    np.testing.assert_allclose(alone[0], y[0, 3:], atol=1e-5)


@pytest.mark.slow
def test_scan_orders_alternate_from_block_to_block(x):
    module = ScanBackbone(config("ll"), ORDERS)
    params = variables(module, x)
    y = module.apply(params, x)

    def seen_at(orders, changed_at):
        module = ScanBackbone(config("ll"), orders)
        moved = module.apply(params, x.at[:, changed_at].add(1)) - module.apply(params, x)
        return np.abs(np.asarray(moved)).max(axis=(0, 2)) > 1e-5

    assert seen_at(ORDERS, 3).all()
    assert seen_at(ORDERS[:1], 3).tolist() == [False] * 3 + [True] * 3
    assert seen_at(ORDERS[1:], 3).tolist() == [True] * 4 + [False] * 2
    mirrored = ScanBackbone(config("ll"), ORDERS[::-1]).apply(params, x[:, ::-1])
    np.testing.assert_allclose(mirrored, y[:, ::-1], atol=1e-5)


def test_orders_that_are_no_permutation_are_rejected(x):
    with pytest.raises(ArgumentError, match=r"permutations of the 6 positions of x, got \(0, 1\)"):
        ScanBackbone(CFG, ((0, 1),)).init(jax.random.key(0), x)
    with pytest.raises(ConfigError, match="bidirectional must be False with orders"):
        Classifier(CFG, 3, bidirectional=True, orders=ORDERS)


# Heads.


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_classifier_ignores_padding(vectors, bidirectional):
    module = Classifier(CFG, 5, in_dim=C, bidirectional=bidirectional)
    params = variables(module, vectors)
    logits = module.apply(params, vectors, IDS)
    assert logits.shape == (B, 5) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, module.apply(params, vectors.at[1, 4:].add(1), IDS))
    alone = module.apply(params, vectors[1:, :4])
    np.testing.assert_allclose(alone[0], logits[1], atol=1e-5)


@pytest.mark.slow
def test_a_classifier_of_two_documents_encodes_each_by_itself(vectors):
    module = Classifier(CFG, 2, in_dim=C, num_documents=2)
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    params = variables(module, vectors)  # as a train state, without ids
    assert params["params"]["head"]["kernel"].shape == (4 * D, 2)
    logits = module.apply(params, vectors, ids)
    # The same documents with more padding between them.
    spread = jnp.concatenate([vectors[:1, :2], vectors[:1, 4:5] * 0, vectors[:1, 2:5]], axis=1)
    other = module.apply(params, spread, jnp.asarray([[1, 1, 0, 2, 2, 2]]))
    np.testing.assert_allclose(other[0], logits[0], atol=1e-5)
    with pytest.raises(ArgumentError, match="num_documents must be 1, or 2 with segment_ids"):
        module.apply(params, vectors)


def test_a_head_of_positions_is_causal_and_restarts_with_a_document(vectors):
    module = PositionHead(CFG, 1, in_dim=C)
    params = variables(module, vectors)
    y = module.apply(params, vectors)
    assert y.shape == (B, T, 1)
    changed = module.apply(params, vectors.at[:, 3].add(1)) - y
    assert (np.abs(np.asarray(changed)).max(axis=(0, 2)) > 1e-6).tolist() == [False] * 3 + [
        True
    ] * 3
    ids = jnp.asarray([[1, 1, 2, 2, 2, 2]] * B)
    packed = module.apply(params, vectors, ids)
    np.testing.assert_allclose(packed[:, 2:], module.apply(params, vectors[:, 2:]), atol=1e-5)


def test_tokens_are_embedded_as_in_a_language_model():
    module = PositionHead(CFG, 2)
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    params = variables(module, tokens)
    assert params["params"]["token_embedding"]["embedding"].shape == (11, D)
    assert module.apply(params, tokens).shape == (2, 3, 2)
    with pytest.raises(ArgumentError, match=r"x must be tokens \(B T\), got shape \(2, 3, 16\)"):
        module.apply(params, jnp.zeros((2, 3, D)))
    with pytest.raises(ArgumentError, match=r"vectors \(B T C\) with C=3, got shape \(2, 6, 4\)"):
        PositionHead(CFG, 2, in_dim=3).init(jax.random.key(0), jnp.zeros((2, 6, 4)))


# Losses.


class Fixed:
    """Stands for a model whose outputs are given."""

    def __init__(self, outputs):
        self.outputs = outputs

    def apply(self, variables, inputs, segment_ids, **options):
        return self.outputs


def batch_of(targets, weights, inputs=None):
    targets, weights = np.asarray(targets), np.asarray(weights, np.float32)
    ids = np.ones(targets.shape, np.int32)
    inputs = ids if inputs is None else inputs
    return Batch(inputs, targets, ids, weights, np.arange(len(targets)))


def test_squared_errors_are_weighted_and_counted(rng):
    outputs = rng.standard_normal((2, 3, 1)).astype(np.float32)
    targets = rng.standard_normal((2, 3)).astype(np.float32)
    weights = np.array([[0, 1, 1], [0, 1, 0]], np.float32)
    batch = batch_of(targets, weights)
    loss, sums = head_losses.squared_error_loss(Fixed(jnp.asarray(outputs)), {}, batch)
    expected = ((outputs[..., 0] - targets) ** 2 * weights).sum()
    assert float(loss) == float(sums.ce_sum) == pytest.approx(expected, rel=1e-6)
    assert float(sums.weight_sum) == 3
    with pytest.raises(ArgumentError, match="num_outputs must be 1 for squared errors, got 2"):
        head_losses.squared_error_loss(Fixed(jnp.zeros((2, 3, 2))), {}, batch)


def test_the_class_of_a_sequence_is_its_only_target_and_padding_does_not_count():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.8, 0.1, 0.1]]))
    batch = pad_batch(batch_of([[-1, 0, -1], [-1, -1, 1]], [[0, 1, 0], [0, 0, 1]]), 3)
    loss, sums = head_losses.classification_loss(Fixed(logits), {}, batch)
    assert float(loss) == pytest.approx(-np.log(0.7) - np.log(0.3), rel=1e-5)
    assert (float(sums.weight_sum), float(sums.correct_sum)) == (2, 1)


def test_classes_of_positions_are_weighted():
    logits = jnp.log(jnp.asarray([[[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]]))
    batch = batch_of([[0, 0, -1]], [[1, 1, 0]])
    loss, sums = head_losses.position_classification_loss(Fixed(logits), {}, batch)
    assert float(loss) == pytest.approx(-np.log(0.7) - np.log(0.4), rel=1e-5)
    assert (float(sums.weight_sum), float(sums.correct_sum)) == (2, 1)


@pytest.mark.slow
def test_a_train_step_reduces_the_mean_squared_error(vectors):
    model = PositionHead(CFG, 1, in_dim=C)
    batch = batch_of(np.asarray(vectors[..., 0]), np.ones((B, T)), np.asarray(vectors))
    cfg = TrainConfig(steps=30, lr=0.01, warmup_steps=0)
    tx = make_optimizer(cfg)
    state = init_state(model, tx, jax.random.key(0), vectors)
    loss_fn = functools.partial(head_losses.squared_error_loss, model)
    step = jax.jit(make_train_step(model, tx, cfg, loss_fn))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    expected = np.mean(np.square(np.asarray(vectors[..., 0])))
    assert losses[0] == pytest.approx(expected, rel=0.5) and losses[-1] < losses[0] / 3
