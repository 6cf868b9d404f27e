"""The op `mlstm`: `api` is the public function, beside it one file per implementation."""
