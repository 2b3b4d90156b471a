"""The models and recipes that mergekit's own outputs are of."""

import importlib.util
import json
from pathlib import Path

from fishjax import checkpoint, tree

HERE = Path(__file__).parent / "fixtures" / "mergekit"


def _maker():
    spec = importlib.util.spec_from_file_location("make", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = _maker().models()


def enter(folder, monkeypatch):
    """Write the models that the recipes name, and make their folder the working directory."""
    for name, tensors in MODELS.items():
        checkpoint.save_params(folder / name, tree.nest(tensors))
        (folder / name / "config.json").write_text(json.dumps(_maker().config()))
    monkeypatch.chdir(folder)
    return folder
