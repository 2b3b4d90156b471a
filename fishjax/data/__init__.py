"""Data: TFDS builders read without TensorFlow, other worlds of the digits, shuffled batches."""

from fishjax.data._batches import batches, concatenate, examples
from fishjax.data._shifts import only, rotated
from fishjax.data._tfds import load

__all__ = ["batches", "concatenate", "examples", "load", "only", "rotated"]
