"""Merging: several models become one, each method a rule for one block of entries.

The same rules run on trees (eager, under `jit`, sharded) and, with `files`, between files in bounded
memory and without jax. `METHODS` names them all.
"""

from fishjax.merge import search
from fishjax.merge._average import AVERAGE, average
from fishjax.merge._breadcrumbs import BREADCRUMBS, breadcrumbs
from fishjax.merge._dare import DARE, dare
from fishjax.merge._explain import explain, explain_files
from fishjax.merge._files import estimate, files
from fishjax.merge._fisher import FISHER, fisher
from fishjax.merge._gradient_matching import GRADIENT_MATCHING, gradient_matching
from fishjax.merge._information import Evidence, add, information, resolve, subtract, three_way
from fishjax.merge._model_stock import MODEL_STOCK, model_stock
from fishjax.merge._patch_files import PATCH_METHODS, information_files, merge_patches, patch_files
from fishjax.merge._patches import patches
from fishjax.merge._recipe import estimate_recipe, find_dtype, run_recipe
from fishjax.merge._regmean import regmean
from fishjax.merge._slerp import NUSLERP, SLERP, nuslerp, slerp
from fishjax.merge._task import TASK_ARITHMETIC, WISE_FT, task_arithmetic, wise_ft
from fishjax.merge._ties import TIES, ties

METHODS = {
    "average": AVERAGE,
    "breadcrumbs": BREADCRUMBS,
    "dare": DARE,
    "fisher": FISHER,
    "gradient_matching": GRADIENT_MATCHING,
    "model_stock": MODEL_STOCK,
    "nuslerp": NUSLERP,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "wise_ft": WISE_FT,
}


def __getattr__(name: str) -> object:
    if name == "grams":  # runs a model, so it needs jax, which merging files does not
        from fishjax.merge._grams import grams

        return grams
    raise AttributeError(f"module `fishjax.merge` has no attribute `{name}`")


__all__ = [
    "METHODS",
    "PATCH_METHODS",
    "Evidence",
    "add",
    "average",
    "breadcrumbs",
    "dare",
    "estimate",
    "estimate_recipe",
    "explain",
    "explain_files",
    "files",
    "find_dtype",
    "fisher",
    "gradient_matching",
    "grams",
    "information",
    "information_files",
    "merge_patches",
    "model_stock",
    "nuslerp",
    "patch_files",
    "patches",
    "regmean",
    "resolve",
    "run_recipe",
    "search",
    "slerp",
    "subtract",
    "task_arithmetic",
    "three_way",
    "ties",
    "wise_ft",
]
