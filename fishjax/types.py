"""The words of the library: what is passed between its rooms.

Letters of shapes: B batch, T tokens, C classes, V vocabulary, N kept entries, r rank, `*p` a leaf's
own shape. Nothing here imports jax, so file-only commands may use it.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Array: TypeAlias = Any  # a jax or numpy array
Params: TypeAlias = Any  # a pytree of inexact arrays, each `[*p]`
Fisher: TypeAlias = Any  # like `Params`: the diagonal of the Fisher information, >= 0
Mask: TypeAlias = Any  # like `Params`, with a bool array for every leaf: True is kept, trained
Example: TypeAlias = Any  # a pytree of arrays without a batch axis
Batch: TypeAlias = Any  # a pytree of arrays whose leading axis is B

LossFn: TypeAlias = Callable[[Params, Example], Array]  # one example -> nats, a scalar
BatchLossFn: TypeAlias = Callable[[Params, Batch], Array]  # a batch -> nats, a scalar
LogitsFn: TypeAlias = Callable[[Params, Example], Array]  # one example -> `[C]` or `[T, V]`
TokenMask: TypeAlias = Callable[[Example], Array]  # one example -> bool `[T]`: the tokens that count

Patch: TypeAlias = Mapping[str, Any]  # a leaf's name -> what is done to it (a kind of `patches`)
Digest: TypeAlias = str  # "sha256:" and 64 hexadecimal digits
