"""Shared by the tests of preparation."""

import json

from xlstm_jax.data.prepare import PrepareConfig, prepare


class Interrupted(BaseException):
    """Stands for a signal."""


def write_records(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def run(source, out, *, num_workers=1, on_progress=lambda progress: None, **options):
    names = ("shard", "fresh")
    settings = {name: value for name, value in options.items() if name not in names}
    cfg = PrepareConfig(source=str(source), **settings)
    options = {name: value for name, value in options.items() if name in names}
    return prepare(cfg, out, num_workers=num_workers, on_progress=on_progress, **options)


def files(out, *, with_ledger=False):
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in paths
        if with_ledger or path.parent.name != "ledger"
    }
