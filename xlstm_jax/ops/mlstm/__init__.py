"""The op `mlstm`: the public function is in `api`; the other modules are implementations."""
