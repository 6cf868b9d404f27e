"""`python -m xlstm_jax` is the command `xlstm-jax`."""

import sys

from xlstm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
