"""Merging: several models become one, each method a rule for one block of entries.

The same rules run on trees (eager, under `jit`, sharded).
"""

from fishjax.merge._average import AVERAGE, average
from fishjax.merge._fisher import FISHER, fisher

METHODS = {"average": AVERAGE, "fisher": FISHER}

__all__ = ["METHODS", "average", "fisher"]
