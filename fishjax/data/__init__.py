"""Data: TFDS builders read without TensorFlow, JSON lines, templates, other worlds of the digits, batches."""

from fishjax.data._batches import batches, concatenate, examples
from fishjax.data._choices import check_choices, encode_choices, few_shot, mix
from fishjax.data._jsonl import load_jsonl
from fishjax.data._shifts import inverted, mirrored, noisy, only, rotated
from fishjax.data._templates import Question, Template, load_templates, render, render_all
from fishjax.data._tfds import load

__all__ = [
    "Question",
    "Template",
    "batches",
    "check_choices",
    "concatenate",
    "encode_choices",
    "examples",
    "few_shot",
    "inverted",
    "load",
    "load_jsonl",
    "load_templates",
    "mirrored",
    "mix",
    "noisy",
    "only",
    "render",
    "render_all",
    "rotated",
]
