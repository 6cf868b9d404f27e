"""What several processes of one run have to do besides computing: wait, and tell what they did."""

import contextlib
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

log = logging.getLogger("xlstm_jax")
"""What a process of several has done; alone, the metrics say it."""


def wait_for_all(where: str) -> None:
    """Returns once every process of the program is here; alone, at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def process_log(run_dir: Path) -> Iterator[None]:
    """Within, `log` and all warnings go to RUN/process_I.log, where there are several processes."""
    if jax.process_count() == 1:
        yield
        return
    path = run_dir / f"process_{jax.process_index()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)  # of others the root passes warnings on
    try:
        devices = ", ".join(map(str, jax.local_devices()))
        count = jax.process_count()
        log.info("process %d of %d on %s: %s", jax.process_index(), count, platform.node(), devices)
        yield
    except BaseException:
        log.exception("the run ends with an error")
        raise
    finally:
        root.removeHandler(handler)
        log.setLevel(level)
        handler.close()
