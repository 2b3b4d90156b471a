"""fishjax: patch, vet, merge and compose models the way open-source software is built.

The rooms, in the order in which they may import each other (a test holds it):

    types, errors, tree -> leaves -> fisher -> masks -> patches -> checkpoint -> models -> data
      -> mesh -> train -> contribute -> merge -> compose -> vet -> store -> swarm -> cli

Importing `fishjax` loads none of them, so that commands which only read files start without jax.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "checkpoint",
    "contribute",
    "data",
    "errors",
    "fisher",
    "masks",
    "merge",
    "mesh",
    "models",
    "patches",
    "plot",
    "train",
    "tree",
    "vet",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"fishjax.{name}")
    raise AttributeError(f"module `fishjax` has no attribute `{name}`")


def __dir__():
    return sorted([*__all__, "__version__"])
