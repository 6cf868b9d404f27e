"""Published rules for the widths of up-projections.

Sources: first generation arXiv:2405.04517; large architecture arXiv:2503.13427.
"""

import math


def first_generation_width(
    dim: int, factor: float, multiple: int = 64, *, round_up: bool = True
) -> int:
    """factor * dim rounded to a multiple, as the first generation rounds its up-projections."""
    whole = math.ceil if round_up else math.floor
    return multiple * whole(factor * dim / multiple)


def large_width(dim: int, factor: float, multiple: int = 64) -> int:
    """factor * dim rounded as the large architecture's own code does, in floating point.

    Not a ceiling: a product less than one above a multiple is rounded down (2048.03 gives 2048).
    """
    return int((dim * factor + multiple - 1) // multiple * multiple)


def scaling_width(dim: int, factor: float = 2.667, multiple: int = 64) -> int:
    """factor * dim rounded up to a multiple, as in the scaling study (arXiv:2510.02228)."""
    return multiple * math.ceil(math.ceil(factor * dim) / multiple)
