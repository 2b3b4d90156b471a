"""Vetting: a patch, its base, held tests and a policy go in; findings and one exit code come out.

A check is a function from a `Context` to a `Finding`; `CHECKS` lists those that `fishjax vet` runs.
"""

from fishjax.vet._base import base
from fishjax.vet._context import Context, Finding, Task
from fishjax.vet._downstream import downstream, load_downstream
from fishjax.vet._files import files
from fishjax.vet._integrity import integrity
from fishjax.vet._output import to_json, to_junit, to_markdown, to_text
from fishjax.vet._packs import Pack, load_pack, load_packs, pack, save_pack
from fishjax.vet._policy import TEMPLATE, Policy, load_policy, policy
from fishjax.vet._run import CHECKS, Check, Report, report, run
from fishjax.vet._size import size
from fishjax.vet._statistics import holm, lower_bound, mcnemar, non_inferiority, upper_bound
from fishjax.vet._structure import structure
from fishjax.vet._tests import tests

__all__ = [
    "CHECKS",
    "TEMPLATE",
    "Check",
    "Context",
    "Finding",
    "Pack",
    "Policy",
    "Report",
    "Task",
    "base",
    "downstream",
    "files",
    "holm",
    "integrity",
    "load_downstream",
    "load_pack",
    "load_packs",
    "load_policy",
    "lower_bound",
    "mcnemar",
    "non_inferiority",
    "pack",
    "policy",
    "report",
    "run",
    "save_pack",
    "size",
    "structure",
    "tests",
    "to_json",
    "to_junit",
    "to_markdown",
    "to_text",
    "upper_bound",
]
