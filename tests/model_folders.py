"""The models among the fixtures, what is expected of them, and a change to the tensors of a copy."""

import pathlib

from safetensors.numpy import load_file, save_file

from fishjax import models

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"


def load(case):
    model, params = models.load(FIXTURES / case)
    return model, params, load_file(FIXTURES / case / "expected.safetensors")


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
