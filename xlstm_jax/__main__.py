"""Runs the command `xlstm-jax` for `python -m xlstm_jax`."""

import sys

from xlstm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
