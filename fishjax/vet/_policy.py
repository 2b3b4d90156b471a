"""The maintainer's policy: what a patch may change, and how well the held tests must be kept."""

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fishjax import strict_yaml
from fishjax.errors import UsageError


class Policy(NamedTuple):
    """Limits that `vet` holds a patch to; None is no limit. `TEMPLATE` explains each one."""

    max_parameters: int | None = None
    max_fraction: float | None = None
    max_bytes: int | None = None
    max_file_fraction: float | None = None
    max_relative_norm: float | None = None
    max_kl: float | None = None
    allowed: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    require_tests: bool = True
    confidence: float = 0.95
    supported_accuracy: float = 0.0
    nfr_budget: float = 0.02
    non_inferiority_margin: float = 0.02
    min_gain: float = 0.01
    tests: Mapping[str, Mapping[str, float]] = {}

    def limit(self, key: str, test: str) -> float:
        """Return a limit for one test: its own where it has one, else the general one."""
        return self.tests.get(test, {}).get(key, getattr(self, key))


TEMPLATE = """\
# What `fishjax vet` accepts. `null` is no limit; leaf names are regular expressions.

# How much a patch may change.
max_parameters: null          # numbers that the patch carries
max_fraction: null            # the same as a share of the model's, in (0, 1]
max_bytes: null               # size of the patch file
max_file_fraction: null       # the same as a share of the model's files
max_relative_norm: null       # |change| / |weights|, over the leaves that it touches
max_kl: null                  # nats per prediction on the held tests' inputs, base against new; not for
                              # tests that the patch claims to raise, unless they have a limit of their own

# Where it may change it.
allowed: []                   # if any is given, every leaf touched must match one
forbidden: []                 # no leaf touched may match any

# How the held tests must come out.
require_tests: true           # without a held test the answer is "inconclusive" (7)
confidence: 0.95              # of every statistical statement below
supported_accuracy: 0         # a test that the base passes less often than this is not supported yet:
                              # it must rise if the patch claims so, and else only warns
nfr_budget: 0.02              # at most this share may go from right to wrong, shown by an upper bound
non_inferiority_margin: 0.02  # accuracy may fall by less than this, shown by a paired test
min_gain: 0.01                # a test that the patch claims to raise must rise by this much, significantly
tests: {}                     # by name, limits of their own, for instance {rotated: {min_gain: 0.1}}
"""

_WITHIN = {  # lowest and highest value, and whether they are allowed themselves
    "max_fraction": (0, 1, "(0, 1]"),
    "max_file_fraction": (0, math.inf, "(0, inf)"),
    "max_relative_norm": (0, math.inf, "(0, inf)"),
    "max_kl": (0, math.inf, "(0, inf)"),
    "confidence": (0.5, 1, "(0.5, 1)"),
    "supported_accuracy": (0, 1, "[0, 1)"),
    "nfr_budget": (0, 1, "(0, 1)"),
    "non_inferiority_margin": (0, 1, "(0, 1)"),
    "min_gain": (0, 1, "[0, 1)"),
}
_OPTIONAL = {k for k in Policy._fields if k.startswith("max_")}
_PER_TEST = ("max_kl", "nfr_budget", "non_inferiority_margin", "min_gain")


def load_policy(path: str | Path) -> Policy:
    """Read and check a policy file in YAML.

    Raises:
      UsageError: no such file, no YAML, an unknown key (near names are listed) or a value out of range.
    """
    values = strict_yaml.load(path, f"the policy `{path}`")
    if not isinstance(values, Mapping):
        raise UsageError(f"the policy `{path}` must be a mapping of keys; got {type(values).__name__}")
    return policy(values, where=f"the policy `{path}`")


def policy(values: Mapping[str, Any], *, where: str = "the policy") -> Policy:
    """Return the policy of plain values, each checked; keys that are absent keep their default.

    Raises:
      UsageError: an unknown key, or a value of the wrong type or out of range.

    >>> policy({"nfr_budget": 0.05}).nfr_budget
    0.05
    >>> policy({"nfr_budjet": 0.05})
    Traceback (most recent call last):
        ...
    fishjax.errors.UsageError: the policy has no key `nfr_budjet`; near names: `nfr_budget`
    """
    _known(values, Policy._fields, where)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if value is None and key in _OPTIONAL:
            checked[key] = None
        elif key == "tests":
            checked[key] = _tests(value, where)
        elif key in ("allowed", "forbidden"):
            checked[key] = _patterns(key, value, where)
        elif key == "require_tests":
            if not isinstance(value, bool):
                raise UsageError(f"`{key}` of {where} must be true or false; got {value!r}")
            checked[key] = value
        elif key in ("max_parameters", "max_bytes"):
            if type(value) is not int or value < 1:
                raise UsageError(f"`{key}` of {where} must be a whole number, at least 1; got {value!r}")
            checked[key] = value
        else:
            checked[key] = _number(key, value, where)
    return Policy(**checked)


def _tests(value: Any, where: str) -> dict[str, dict[str, float]]:
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise UsageError(f"`tests` of {where} must map a test's name to limits; got {value!r}")
    for name, limits in value.items():
        _known(limits, _PER_TEST, f"`tests.{name}` of {where}")
    return {str(n): {k: _number(k, v, where) for k, v in limits.items()} for n, limits in value.items()}


def _patterns(key: str, value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(p, str) for p in value):
        raise UsageError(f"`{key}` of {where} must be a list of regular expressions; got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"`{key}` of {where} holds `{pattern}`, which is no regex: {error}") from None
    return tuple(value)


def _number(key: str, value: Any, where: str) -> float:
    low, high, text = _WITHIN[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and low <= value <= high  # NaN compares false
    if not inside or (value == low and text[0] == "(") or (value == high and text[-1] == ")"):
        raise UsageError(f"`{key}` of {where} must be a number in {text}; got {value!r}")
    return float(value)


def _known(values: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=3) or keys
            raise UsageError(f"{where} has no key `{key}`; near names: {', '.join(f'`{k}`' for k in near)}")
