"""The checker of signatures while tests run; `pyproject.toml` names it to the import hook."""

import beartype

# An int serves where a float is asked for: what PEP 484 says, and what the static checker does.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
