"""Mutations of sharding and of data, which a reader chose who had not written the tests."""

from tests.mutations.mutation import Mutation

SHARDING = (
    Mutation(
        "xlstm_jax/sharding/placement.py",
        'math.prod(n for n, name in zip(shape, names, strict=True) if name != "layers")',
        "math.prod(shape)",
        "tests/sharding/test_placement.py -k stacked_layers",
    ),
    Mutation(
        "xlstm_jax/modules/block.py",
        '        r"mlstm/proj_down/kernel": ("inner", "embed"),\n',
        '        r"mlstm/proj_down/kernel": ("embed", "inner"),\n',
        "tests/sharding/test_placement.py -k widths",
    ),
    Mutation(
        "xlstm_jax/sharding/rules.py",
        '        "heads": ("tensor",),\n',
        "",
        "tests/sharding/test_placement.py -k sharded_by_the_rules",
    ),
    Mutation(
        "xlstm_jax/sharding/axes.py",
        "length % (num_shards * sizes[axis]) == 0",
        "length % sizes[axis] == 0",
        "tests/sharding/test_axes.py -k product_of_the_chosen",
    ),
    Mutation(
        "xlstm_jax/sharding/axes.py",
        '_ADAPTERS = {"lora_a": -1, "lora_b": -2}\n',
        '_ADAPTERS = {"lora_a": -2, "lora_b": -1}\n',
        "tests/train/test_lora.py -k mesh",
    ),
    Mutation(
        "xlstm_jax/sharding/devices.py",
        "        if batch_size % size or start % size:\n",
        "        if batch_size % size:\n",
        "tests/sharding/test_distributed.py -k aligned",
    ),
    Mutation(
        "xlstm_jax/ops/sharded/parameters.py",
        "dividing_axes(x.shape[1] // math.prod(auto[axis] for axis in time), sorted(rest), rest)",
        "dividing_axes(x.shape[1], sorted(rest), rest)",
        "tests/ops/test_cross_entropy.py -k shards_of_time",
    ),
    Mutation(
        "xlstm_jax/ops/sharded/parameters.py",
        "jax.lax.psum(a, (*batch, *time))",
        "jax.lax.psum(a, batch)",
        "tests/ops/test_cross_entropy.py -k shards_of_time",
    ),
    Mutation(
        "xlstm_jax/ops/sharded/halo.py",
        "    is_before = jnp.arange(len(last_ids)) < rank\n",
        "    is_before = jnp.arange(len(last_ids)) <= rank\n",
        "tests/ops/test_documents.py",
    ),
    Mutation(
        "xlstm_jax/ops/sharded/halo.py",
        "        before = jnp.where(j < rank, after, before)\n",
        "        before = jnp.where(j <= rank, after, before)\n",
        "tests/ops/test_context.py -k convolution",
    ),
    Mutation(
        "xlstm_jax/ops/sharded/halo.py",
        "    return jnp.where(rank == 0, state, received), jax.lax.psum(last, axes)\n",
        "    return received, jax.lax.psum(last, axes)\n",
        "tests/ops/test_context.py -k convolution",
    ),
    Mutation(
        "xlstm_jax/ops/mlstm/context_parallel.py",
        "lambda a, b: jnp.where(rank >= distance, a, b), received, identity)\n",
        "lambda a, b: jnp.where(rank > distance, a, b), received, identity)\n",
        "tests/ops/test_context.py -k eight_shards",
    ),
)

DATA = (
    Mutation(
        "xlstm_jax/data/windows.py",
        "start == 0 or len(self.store.ends(start - 1, start)) > 0",
        "len(self.store.ends(start, start + 1)) > 0",
        "tests/data/test_stream.py -k start_at_2",
    ),
    Mutation(
        "xlstm_jax/data/windows.py",
        "                    is_target[i, at:end] = mask\n",
        "                    is_target[i, : end - at] = mask\n",
        "tests/data/test_packing.py -k loss_mask",
    ),
    Mutation(
        "xlstm_jax/data/stream.py",
        "self._start(step) // self.cfg.batch_size % length\n",
        "self._start(step) // self.cfg.batch_size\n",
        "tests/data/test_stream.py -k begin_again",
    ),
    Mutation(
        "xlstm_jax/data/stream.py",
        "for start, end in self.skips if start <= step)",
        "for start, end in self.skips if start < step)",
        "tests/train/test_rewind.py -k skips_move",
    ),
    Mutation(
        "xlstm_jax/data/stream.py",
        "            order = self._order(examples, self.cfg.seed, number)\n",
        "            order = self._order(examples, self.cfg.seed)\n",
        "tests/data/test_mixture.py -k different_orders",
    ),
    Mutation(
        "xlstm_jax/data/mixture.py",
        "schedule.before[phase] + schedule.total(phase, cycle)",
        "schedule.total(phase, cycle)",
        "tests/data/test_mixture.py -k rank",
    ),
    Mutation(
        "xlstm_jax/data/order.py",
        "hashing.fold(hashing.fold(keys, _SETS), number.astype(np.uint64))\n",
        "hashing.fold(hashing.fold(keys, _SETS), np.zeros_like(number, np.uint64))\n",
        "tests/data/test_order.py -k every_set",
    ),
    Mutation(
        "xlstm_jax/data/batch_sizes.py",
        "bisect.bisect_right(self._parts, step, key=lambda part: part[0]) - 1",
        "max(bisect.bisect_left(self._parts, step, key=lambda part: part[0]) - 1, 0)",
        "tests/data/test_stream.py -k ramp",
    ),
    Mutation(
        "xlstm_jax/data/batch.py",
        "(0, missing), constant_values=-1)",
        "(0, missing))",
        "tests/data/test_loader.py -k evaluation_covers",
    ),
    Mutation(
        "xlstm_jax/data/packing.py",
        "[_VERSION, packing, seq_len, GROUP_WINDOWS[packing], OPEN_WINDOWS]",
        "[_VERSION, packing, GROUP_WINDOWS[packing], OPEN_WINDOWS]",
        "tests/data/test_packing.py -k other_windows",
    ),
    Mutation(
        "xlstm_jax/data/chat.py",
        "            mask = np.append(mask, mask[-1:] if len(mask) else False)\n",
        "            mask = np.append(mask, False)\n",
        "tests/data/test_chat.py -k without_special",
    ),
    Mutation(
        "xlstm_jax/data/prepare/encode.py",
        "    ends = stops[[part.ends_document for part in parts]]\n",
        "    ends = stops\n",
        "tests/data/prepare/test_prepare.py -k pieces",
    ),
    Mutation(
        "xlstm_jax/data/shards/manifest.py",
        "if vocab_size <= 1 << 16 else",
        "if vocab_size - 1 <= 1 << 16 else",
        "tests/data/shards/test_open.py -k dtype",
    ),
    Mutation(
        "xlstm_jax/data/shards/blocks.py",
        "            if path.stat().st_size != length * (item + self.has_mask):\n",
        "            if path.stat().st_size < length * item:\n",
        "tests/data/shards/test_remote.py -k more_bytes",
    ),
    Mutation(
        "xlstm_jax/data/shards/store.py",
        "            np.ones(last - first, np.bool_)\n",
        "            np.zeros(last - first, np.bool_)\n",
        "tests/data/shards/test_open.py -k datatrove",
    ),
    Mutation(
        "xlstm_jax/data/shards/store.py",
        "        return self.store.loss_mask(self.start + start, self.start + stop)\n",
        "        return self.store.loss_mask(start, stop)\n",
        "tests/data/shards/test_store.py",
    ),
)
