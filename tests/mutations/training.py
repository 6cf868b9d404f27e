"""Mutations of training and of models, which a reader chose who had not written the tests."""

from tests.mutations.mutation import Mutation

STEPS = (
    Mutation(
        "xlstm_jax/train/step.py",
        "part_key = None if key is None else jax.random.fold_in(key, index)",
        "part_key = key",
        "tests/train/test_step.py -k dropout",
    ),
    Mutation(
        "xlstm_jax/train/step.py",
        "jnp.zeros(s.shape, common_dtype(jnp.float32, s.dtype)), shapes)",
        "jnp.zeros(s.shape, s.dtype), shapes)",
        "tests/train/test_step.py -k accumulated_in_float32",
    ),
    Mutation(
        "xlstm_jax/train/step.py",
        "new.replace(ema=guard.select(ok, _ema(state.ema, trained, cfg), state.ema))",
        "new.replace(ema=_ema(state.ema, trained, cfg))",
        "tests/train/test_averages.py -k moving_average",
    ),
    Mutation(
        "xlstm_jax/train/guard.py",
        "        ema_grad_norm=jnp.where(ok, updated.astype(mean.dtype), mean),\n",
        "        ema_grad_norm=jnp.where(finite, updated.astype(mean.dtype), mean),\n",
        "tests/train/test_step.py -k its_own_bound",
    ),
    Mutation(
        "xlstm_jax/train/schedules.py",
        '    last = lr if cfg.schedule == "constant" or not parts.decay else end\n',
        '    last = lr if cfg.schedule == "constant" else end\n',
        "tests/train/test_optimizer.py -k cooldown",
    ),
    Mutation(
        "xlstm_jax/train/schedules.py",
        '    last = lr if cfg.schedule == "constant" or not parts.decay else end\n',
        "    last = lr if not parts.decay else end\n",
        "tests/train/test_optimizer.py -k every_part",
    ),
    Mutation(
        "xlstm_jax/train/optimizer.py",
        "optax.chain(clip, *parts)",
        "optax.chain(*parts, clip)",
        "tests/train/test_optimizer.py -k clipped",
    ),
    Mutation(
        "xlstm_jax/train/losses.py",
        "tokenizer.num_bytes(batch.targets[batch.weights > 0])",
        "tokenizer.num_bytes(batch.targets.ravel())",
        "tests/evaluate/test_perplexity.py -k bits_per_byte",
    ),
    Mutation(
        "xlstm_jax/train/step.py",
        "carry = guard.select(ok, Carry(recurrent, batch.index), carry)",
        "carry = Carry(guard.select(ok, recurrent, carry.state), batch.index)",
        "tests/train/test_carry_state.py -k skipped",
    ),
    Mutation(
        "xlstm_jax/train/loop.py",
        "        sequences = sizes.before(step) - sizes.before(step - num_steps)\n",
        "        sequences = num_steps * sizes.at(step)\n",
        "tests/train/test_batches.py -k mean_batch",
    ),
    Mutation(
        "xlstm_jax/train/progress.py",
        "        totals = jax.tree.map(float, jax.device_get(self.totals))\n",
        "        totals = jax.tree.map(float, metrics.empty())\n",
        "tests/train/test_loop.py -k interrupted_run_resumes",
    ),
    Mutation(
        "xlstm_jax/train/progress.py",
        'for step, end in values.get("skips", ())]\n',
        "for step, end in ()]\n",
        "tests/train/test_rewind.py -k interrupted",
    ),
    Mutation(
        "xlstm_jax/train/checkpoint/restore.py",
        "    if latest_step(run_dir, at_most) != 0:\n",
        "    if latest_step(run_dir) != 0:\n",
        "tests/train/test_checkpoint.py -k recognized",
    ),
    Mutation(
        "xlstm_jax/train/batches.py",
        "for start, end in self._skips if start <= step)",
        "for start, end in self._skips if start < step)",
        "tests/train/test_rewind.py -k before_a_spike",
    ),
    Mutation(
        "xlstm_jax/train/manifest.py",
        "            checksum = zlib.crc32(block, checksum)\n",
        "            checksum = zlib.crc32(block)\n",
        "tests/train/test_checkpoint.py -k large_file",
    ),
)

MODELS = (
    Mutation(
        "xlstm_jax/modules/conv.py",
        "math.sqrt(math.prod(window[:-1]))",
        "math.sqrt(self.width)",
        "tests/modules/test_initializers.py -k mix_channels",
    ),
    Mutation(
        "xlstm_jax/modules/mlstm.py",
        "jnp.repeat(f, size, -1), q * size**-0.5\n",
        "jnp.repeat(f, size, -1), q\n",
        "tests/modules/test_switches.py -k without_covariance",
    ),
    Mutation(
        "xlstm_jax/generate/decode.py",
        "        step_keys = jax.vmap(jax.random.fold_in)(keys, carry.length)\n",
        "        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)\n",
        "tests/generate/test_decode.py -k streamed",
    ),
    Mutation(
        "xlstm_jax/generate/prefix_cache.py",
        "        key = hashlib.sha256(key + tokens).digest()\n",
        "        key = hashlib.sha256(tokens).digest()\n",
        "tests/generate/test_prefix_cache.py -k not_computed_again",
    ),
    Mutation(
        "xlstm_jax/generate/session.py",
        "self._tokens[self._point.length :]\n",
        "self._tokens[self._point.num_read :]\n",
        "tests/generate/test_session.py -k copies_rewinds",
    ),
    Mutation(
        "xlstm_jax/convert/shards.py",
        "                yield where[1:], host[layer - where[0].start, ...]\n",
        "                yield where[1:], host[layer, ...]\n",
        "tests/convert/test_memory.py -k layers_of_a_process",
    ),
    Mutation(
        "xlstm_jax/convert/tensors.py",
        '"total_parameters": total // dtype.itemsize, "total_size": total}',
        '"total_parameters": total, "total_size": total * dtype.itemsize}',
        "tests/convert/test_round_trip.py -k have_an_index",
    ),
    Mutation(
        "xlstm_jax/convert/tensors.py",
        "array.nbytes + sum(other.nbytes for other in shard.values()) > limit:\n",
        "sum(other.nbytes for other in shard.values()) > limit:\n",
        "tests/convert/test_round_trip.py -k have_an_index",
    ),
    Mutation(
        "pallas_kernels/mlstm/tpu_forward.py",
        "total = functools.reduce(jnp.add, weights)  # not yet rounded to the dtype of v\n",
        "total = weights[-1]  # not yet rounded to the dtype of v\n",
        "tests/kernels/test_mlstm_tpu.py -k strips_and_blocks",
    ),
    Mutation(
        "pallas_kernels/slstm/tpu_kernels.py",
        "            new = (new[0], new[1], jnp.where(reset, 0.0, new[2]), new[3])\n",
        "            new = (new[0], new[1], new[2], new[3])\n",
        "tests/kernels/test_slstm_tpu.py -k odd_batch",
    ),
    Mutation(
        "pallas_kernels/mlstm/tpu_decode.py",
        "    scale = q.shape[-1] ** -0.5 * factor(READ)\n",
        "    scale = q.shape[-1] ** -0.5\n",
        "tests/kernels/test_mlstm_tpu_step.py -k matches_the_cell",
    ),
    Mutation(
        "pallas_kernels/slstm/triton_decode.py",
        "        h_mask = in_batch & (reset == 0)\n",
        "        h_mask = in_batch\n",
        "tests/kernels/test_slstm_triton_step.py -k matches_the_cell",
    ),
)
