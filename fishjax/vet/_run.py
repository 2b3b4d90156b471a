"""The checks in their order, and how their findings add up to one verdict and exit code."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from fishjax.errors import FishjaxError
from fishjax.vet._base import base
from fishjax.vet._context import Context, Finding
from fishjax.vet._downstream import downstream
from fishjax.vet._integrity import integrity
from fishjax.vet._size import size
from fishjax.vet._structure import structure
from fishjax.vet._tests import tests

Check: TypeAlias = Callable[[Context], Finding]

ON_FILES: tuple[Check, ...] = (integrity, base, structure)  # these need no jax and never hold the model
CHECKS: tuple[Check, ...] = (*ON_FILES, size, tests, downstream)

# The exit code of a report is the first of these that a finding has: what makes the others
# meaningless comes first, and a shown failure counts before a lack of evidence.
PRIORITY = (3, 4, 6, 5, 2, 1, 7)


class Report(NamedTuple):
    """All findings in order, the verdict "accept", "refuse" or "inconclusive", and the exit code."""

    findings: tuple[Finding, ...]
    verdict: str
    exit_code: int


def run(context: Context, checks: Sequence[Check] = CHECKS) -> Report:
    """Run checks in order and add up their findings; see `PRIORITY` for the exit code.

    A `FishjaxError` that a check raises is its finding. A malformed file (3) stops at once; all else runs
    to the end, so that a contributor sees everything that is to be mended.

    >>> run(Context({}, {}), [lambda context: Finding("size", "fail", 1, "changes nothing", {})]).verdict
    'refuse'
    """
    for check in checks:
        if any(f.exit_code == 3 for f in context.findings):
            break
        try:
            finding = check(context)
        except FishjaxError as error:
            name = check.__name__.strip("_")
            finding = Finding(name, "fail", error.exit_code, str(error), {})
        context = context._replace(findings=(*context.findings, finding))
    return report(context.findings)


def report(findings: Sequence[Finding]) -> Report:
    """Return the report of some findings.

    >>> report([Finding("tests", "fail", 7, "too few examples", {})]).verdict
    'inconclusive'
    """
    codes = {f.exit_code for f in findings} - {0}
    code = next((c for c in PRIORITY if c in codes), max(codes, default=0))
    verdict = {0: "accept", 7: "inconclusive"}.get(code, "refuse")
    return Report(tuple(findings), verdict, code)
