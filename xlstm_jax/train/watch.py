"""`train.watch`: statistics of gates, and norms of parameters and gradients, every few steps.

A separate program, compiled at its first use, computes them from a few sequences of the current
batch, so they cost little.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.data.batch import Batch
from xlstm_jax.sharding import path_name
from xlstm_jax.sharding.rules import use_rules
from xlstm_jax.train.gates import gate_statistics
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import TrainState, eval_params
from xlstm_jax.train.step import loss_of_trained, sum_gradients
from xlstm_jax.train.trainable import partition
from xlstm_jax.typing import Array, PyTree

MAX_SEQUENCES = 4
"""Sequences of a batch that are used, but at least one for every shard of the batch."""

MAX_POSITIONS = 1024
"""Positions of a sequence that are used: gates are recomputed one position after another."""

_STACK = "stack/"  # part of the paths of parameters with a leading axis `layers`


class Watch:
    """The statistics of a run; those of a step are dispatched, and fetched when they are ready."""

    def __init__(self, program: TrainProgram):
        self._program, self._cfg = program, program.cfg
        self._sizes: set[int] = set()  # of batches with a compiled program

    def is_due(self, step: int) -> bool:
        """Whether to compute statistics after `step` steps."""
        return self._cfg.train.watch != "none" and step % self._cfg.train.watch_every == 0

    def is_compiled(self, batch: Batch) -> bool:
        """Whether `dispatch` of a batch of this size compiles nothing."""
        return len(batch.inputs) in self._sizes

    def dispatch(self, state: TrainState, batch: Batch) -> PyTree:
        """Starts the computation for a state and a batch on the devices."""
        self._sizes.add(len(batch.inputs))
        return self._statistics(state.params, state.opt_state, batch)

    def record(self, statistics: PyTree) -> dict[str, Any]:
        """Fetches what `dispatch` returned, as the JSON values of a record."""
        host = jax.device_get(statistics)
        record = {}
        if gates := self._by_block(host.get("gates", {})):
            record["gates"] = gates
        if "params" in host:
            record["params"] = jax.tree.map(_to_json, host["params"])
        return record

    @functools.cached_property
    def _statistics(self) -> jax.stages.Wrapped:
        watch, devices = self._cfg.train.watch, self._program.devices

        def statistics(params: PyTree, opt_state: PyTree, batch: Batch) -> dict[str, PyTree]:
            # Inside the jitted function: the rules are read while it is traced.
            with use_rules(devices.rules):
                sample = self._sample(batch)
                result = {}
                if watch in ("gates", "all"):
                    params_of_model = eval_params(self._cfg, params, opt_state)
                    result["gates"] = self._gates(params_of_model, sample)
                if watch in ("params", "all"):
                    result["params"] = self._norms(params, sample)
                return result

        return jax.jit(statistics, out_shardings=devices.replicated)

    def _sample(self, batch: Batch) -> Batch:
        """A few sequences, equally many from every device, and their first positions."""
        rules, sizes = self._program.devices.rules, self._program.devices.mesh.shape
        shards = math.prod(sizes[axis] for axis in rules["batch"])
        time_shards = math.prod(sizes[axis] for axis in rules["time"])
        num_sequences, seq_len = batch.inputs.shape
        limit, local = max(1, MAX_SEQUENCES // shards), num_sequences // shards
        count = shards * max(n for n in range(1, limit + 1) if local % n == 0)
        positions = min(seq_len, time_shards * math.ceil(MAX_POSITIONS / time_shards))

        def pick(x: Array) -> Array:
            # Strided: a slice of the first sequences would be on the first devices only.
            x = x.reshape(count, -1, *x.shape[1:])[:, 0]
            return x[:, :positions] if x.ndim > 1 else x

        return jax.tree.map(pick, batch)

    def _gates(self, params: PyTree, batch: Batch) -> dict[str, dict[str, Array]]:
        # As in `losses.token_sums`: padding is a document of its own.
        documents = jnp.where(batch.segment_ids == 0, -1, batch.segment_ids)
        _, state, captured = self._program.model.apply(
            {"params": params},
            batch.inputs,
            segment_ids=documents if self._cfg.train.document_resets else None,
            has_padding=False,
            head=False,
            capture=("gates",),
        )
        return gate_statistics(self._cfg.model, captured["gates"], state, batch.segment_ids != 0)

    def _norms(self, params: PyTree, batch: Batch) -> dict[str, dict[str, Array]]:
        """The norms of the trained parameters and of their gradients."""
        cfg, model = self._cfg, self._program.model
        trained, frozen = partition(params, cfg.train.freeze)
        loss_of = loss_of_trained(model, cfg.train, frozen, self._program.loss_fn, cfg.lora)
        grads, sums, _ = sum_gradients(loss_of, trained, batch, None)

        def norms(path: tuple[Any, ...], param: Array, grad: Array) -> dict[str, Array]:
            first = 1 if _STACK in path_name(path) else 0
            axes = tuple(range(first, param.ndim))
            squares = (jnp.sum(x.astype(jnp.float32) ** 2, axes) for x in (param, grad))
            norm, grad_norm = map(jnp.sqrt, squares)
            return {"norm": norm, "grad_norm": grad_norm / sums.weight_sum}

        leaves = jax.tree_util.tree_leaves_with_path(trained)
        pairs = zip(leaves, jax.tree.leaves(grads), strict=True)
        return {path_name(path): norms(path, param, grad) for (path, param), grad in pairs}

    def _by_block(self, by_letter: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """The statistics of every block, `layers H` to H, in the order of the pattern."""
        blocks, pattern = {}, self._cfg.model.pattern
        for index, letter in enumerate(pattern):
            if letter in by_letter:
                layer = pattern[:index].count(letter)
                blocks[f"{index}{letter}"] = {
                    name: _to_json(values[layer]) for name, values in by_letter[letter].items()
                }
        return blocks


def _to_json(values: Any) -> Any:
    """Nested lists of numbers with five digits, enough for statistics of a few sequences."""
    if values.ndim:
        return [_to_json(value) for value in values]
    return float(f"{values:.5g}")
