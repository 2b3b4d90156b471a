"""The diagonal of the Fisher information of any JAX function.

    loss_fn(params, example) -> empirical(loss_fn)   the labels of the data
    logits_fn(params, example) -> sampled(logits_fn) labels drawn from the model
                               -> exact(logits_fn)   the expectation over all labels

Each is a `FisherEstimator`: init, update, finalize; `estimate` runs one over batches; `explain` says how
each leaf's squares are computed.
"""

from fishjax.fisher._auto import explain
from fishjax.fisher._estimators import FisherEstimator, FisherState, empirical, estimate, exact, sampled
from fishjax.fisher._legacy import legacy_argmax, legacy_sqrt_sum

__all__ = [
    "FisherEstimator",
    "FisherState",
    "empirical",
    "estimate",
    "exact",
    "explain",
    "legacy_argmax",
    "legacy_sqrt_sum",
    "sampled",
]
