"""Applies each mutation of the table to a copy of the project, and runs the test that must fail.

    python -m tests.mutations.run
    python -m tests.mutations.run --only ops --jobs 2 --out mutations.json

Exits with 1 if a mutation survives. Takes about fifteen seconds per mutation and job.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import tyro

from tests.mutations.table import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ("xlstm_jax", "pallas_kernels", "experiments", "tests", "pyproject.toml", "README.md")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which mutations to apply, and how many at a time."""

    only: str = ""  # a part of the path of the file that is changed
    jobs: int = 1
    timeout: int = 600  # seconds of one test; a test that takes longer counts as failed
    out: pathlib.Path | None = None  # JSON file to write the result to


def apply(mutation: Mutation, root: pathlib.Path) -> str:
    """Changes the file under `root`; returns its original text."""
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return text


def is_caught(mutation: Mutation, root: pathlib.Path, timeout: int) -> bool:
    """Whether the test of a mutation fails with it, in a copy of the project."""
    original = apply(mutation, root)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-m", "", *mutation.test.split()]
    # The copy precedes an editable installation of the project.
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(command, cwd=root, env=env, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return True
    finally:
        (root / mutation.file).write_text(original, encoding="utf-8")
    if result.returncode not in (0, 1):  # 1: tests failed; others: pytest did not run them
        raise RuntimeError(f"{mutation.test}: {result.stdout.decode()[-2000:]}")
    return result.returncode == 1


def main(args: Arguments) -> int:
    """Prints one line for each mutation."""
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.file]
    if not chosen:
        print(f"error: no mutation is of a file with {args.only!r} in its path", file=sys.stderr)
        return 2
    records = []
    with tempfile.TemporaryDirectory() as folder:
        copies = threading.local()

        def check(mutation: Mutation) -> bool:
            if not hasattr(copies, "root"):
                copies.root = pathlib.Path(folder, str(threading.get_ident()))
                for part in PARTS:
                    copy(ROOT / part, copies.root / part)
            return is_caught(mutation, copies.root, args.timeout)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for mutation, caught in zip(chosen, pool.map(check, chosen), strict=True):
                records.append(mutation._asdict() | {"caught": caught})
                print("caught  " if caught else "SURVIVED", mutation.file, repr(mutation.new)[:60])
                sys.stdout.flush()
    survivors = [record for record in records if not record["caught"]]
    print(f"{len(records) - len(survivors)} of {len(records)} mutations caught")
    if args.out is not None:
        result = {"date": time.strftime("%Y-%m-%d"), "mutations": records}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(survivors))


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file, or a folder without caches."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
