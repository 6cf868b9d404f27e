"""The run-time type checker of tests, which the jaxtyping options in `pyproject.toml` name."""

import beartype

# Accept an int for a float, as PEP 484 and the static checker do.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
