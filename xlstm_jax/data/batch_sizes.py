"""The number of sequences of every step."""

import bisect
import dataclasses
import functools

from xlstm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Sequences of every step, which a ramp may increase over the first steps.

    Raises:
        ConfigError: a share of the ramp is not an integer, or its steps are not in order.
    """

    full: int
    ramp: tuple[tuple[int, float], ...] = ()  # (first step, share of `full`); the first step is 0

    def __post_init__(self):
        steps = [step for step, _ in self.ramp]
        if self.ramp and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ConfigError(
                f"train.batch_ramp must have increasing steps from 0 on, got {steps}; "
                "((0, 0.25), (1000, 1.0)) begins with a quarter of the batch."
            )
        for _, share in self.ramp:
            if not 0 < share <= 1 or (share * self.full) % 1:
                raise ConfigError(
                    "train.batch_ramp must have shares above 0 and at most 1 that give "
                    f"integer numbers of sequences, got {share} of data.batch_size={self.full}."
                )

    @functools.cached_property
    def _parts(self) -> list[tuple[int, int, int]]:
        """(first step, sequences per step, sequences before) of every part."""
        parts, before = [], 0
        for step, share in self.ramp or ((0, 1.0),):
            before += (step - parts[-1][0]) * parts[-1][1] if parts else 0
            parts.append((step, int(share * self.full), before))
        return parts

    def _part(self, step: int) -> tuple[int, int, int]:
        return self._parts[bisect.bisect_right(self._parts, step, key=lambda part: part[0]) - 1]

    def at(self, step: int) -> int:
        """Sequences of a step."""
        return self._part(step)[1]

    def before(self, step: int) -> int:
        """Sequences of all steps before one."""
        first, size, before = self._part(step)
        return before + (step - first) * size

    @property
    def distinct(self) -> set[int]:
        """The different numbers of sequences of a step."""
        return {size for _, size, _ in self._parts}
