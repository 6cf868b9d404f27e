"""Communication between devices: `shard_map` wrappers, sharded parameters, halos in time."""
