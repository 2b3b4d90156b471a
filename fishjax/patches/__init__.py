"""Patches: small pytrees that say how a model changes, and `apply`, which is their meaning.

A patch is a dict from a leaf's name to a kind: `Dense`, `Sparse`, `LowRank`, `Scale` or `Delta`. What is
trained is its inexact leaves, nothing else (`partition` splits them off).
"""

from fishjax.patches._apply import apply, check, combine, compose, num_parameters, partition, touched
from fishjax.patches._bitfit import init_bitfit
from fishjax.patches._delta import Delta
from fishjax.patches._dense import Dense, init_dense
from fishjax.patches._diff import diff
from fishjax.patches._ia3 import KeysValues, Scale, init_ia3
from fishjax.patches._lora import LowRank, init_lora
from fishjax.patches._norms import init_norms
from fishjax.patches._prompt import init_prompt, prompted
from fishjax.patches._sparse import Sparse, init_sparse
from fishjax.patches._stack import Selected, Stacked, part, select, stack, unstack
from fishjax.patches._unfolded import unfold, unfolded, unfolded_report

KINDS = {"dense": Dense, "sparse": Sparse, "low_rank": LowRank, "scale": Scale, "delta": Delta}

__all__ = [
    "KINDS",
    "Delta",
    "Dense",
    "KeysValues",
    "LowRank",
    "Selected",
    "Scale",
    "Sparse",
    "Stacked",
    "apply",
    "check",
    "combine",
    "compose",
    "diff",
    "init_bitfit",
    "init_dense",
    "init_ia3",
    "init_lora",
    "init_norms",
    "init_prompt",
    "init_sparse",
    "num_parameters",
    "part",
    "partition",
    "prompted",
    "select",
    "stack",
    "touched",
    "unfold",
    "unfolded",
    "unfolded_report",
    "unstack",
]
