"""The worlds of the quickstart: which digits there are, and how they are turned."""

import dataclasses

from fishjax import data
from fishjax.types import Batch


@dataclasses.dataclass(frozen=True)
class World:
    """Some classes of the digits, turned by some degrees."""

    name: str
    classes: tuple[int, ...] = tuple(range(10))
    degrees: float = 0.0

    def of(self, digits: Batch) -> Batch:
        """Return the digits as they are in this world."""
        kept = data.only(digits, self.classes)
        return data.rotated(kept, self.degrees) if self.degrees else kept
