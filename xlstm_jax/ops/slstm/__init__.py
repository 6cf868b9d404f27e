"""The op `slstm`: `api` is the public function, beside it one file per implementation."""
