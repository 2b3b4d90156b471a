"""Data: TFDS builders read without TensorFlow, JSON lines, other worlds of the digits, shuffled batches."""

from fishjax.data._batches import batches, concatenate, examples
from fishjax.data._jsonl import load_jsonl
from fishjax.data._shifts import only, rotated
from fishjax.data._tfds import load

__all__ = ["batches", "concatenate", "examples", "load", "load_jsonl", "only", "rotated"]
