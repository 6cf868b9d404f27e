"""Parts of ops that communicate: `shard_map` wrappers, sharded parameters, halos in time."""
