"""What a FISH mask is tried on: a base, data in three splits, and what has to be trained anyway."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import docstrings as sources
from experiments.lab import SPLITS, Task
from fishjax import data, models, patches, train, tree
from fishjax.errors import UsageError
from fishjax.types import Batch, Params


class Problem(NamedTuple):
    """A model to be adapted."""

    name: str
    model: models.Model
    base: Callable[[int], Params]  # seed -> where a training starts
    rows: Mapping[str, Batch]  # by split
    always: tuple[str, ...]  # regexes of leaves that are new and have to be trained: a head
    about: Mapping[str, Any]  # what else made it; cells are kept under this


def digits(
    *, task: Task, before: Task, config: Mapping[str, Any], base_steps: int, data_dir: str = "runs/data"
) -> Problem:
    """Return the digits after a shift, and a small transformer that knows them as they were before."""
    loaded = {s: data.load("bundled_digits", s, data_dir=data_dir) for s in SPLITS}
    model = models.build({"model_type": "fishjax_digits", **config})
    start = model.init(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    state, _ = train.fit(
        train.init(patches.init_dense(start), optimizer),
        train.make_step(models.example_loss(model), optimizer),
        start,
        data.batches(before.of(loaded["train"]), 64, seed=0, epochs=None),
        steps=base_steps,
        description="the base",
    )
    base = patches.apply(start, train.patch_of(state))
    rows = {s: task.of(loaded[s]) for s in SPLITS}
    about = {"model": model.config, "before": before.name, "base_steps": base_steps}
    return Problem(task.name, model, lambda seed: base, rows, (), about)


def docstrings(
    *, model: str, packages: Sequence[str], sizes: tuple[int, int, int], tokens: int, words: int = 24
) -> Problem:
    """Return the question which Python package a docstring is from.

    Args:
      model: a folder with a BERT and its tokenizer, or an installed package that has one in `model/`.
      packages: the classes.
      sizes: examples of each class in train, validation and test.
      tokens, words: a text is cut after so many.
    """
    texts, labels = sources.examples(packages, each=sum(sizes), words=words)
    order = np.argsort(np.array(labels), kind="stable").reshape(len(packages), -1)
    parts = np.split(order, np.cumsum(sizes)[:-1], axis=1)
    rows = {s: ([texts[i] for i in p.ravel()], [labels[i] for i in p.ravel()]) for s, p in zip(SPLITS, parts)}
    return _text(f"docstrings of {', '.join(packages)}", model, rows, classes=len(packages), tokens=tokens)


def tfds(
    *,
    model: str,
    name: str,
    fields: tuple[str, ...],
    classes: int,
    tokens: int,
    splits: tuple[str, str, str] = ("train[:90%]", "train[90%:]", "validation"),
) -> Problem:
    """Return a text classification of TFDS (`glue/rte` ...); the first time it is downloaded.

    Args:
      fields: one text or a pair of them, such as `("sentence1", "sentence2")`.
      splits: for training, choosing and reporting; the tests of GLUE have no labels.
    """
    rows = {}
    for split, where in zip(SPLITS, splits):
        found = data.load(name, where)
        columns = [[bytes(x).decode() for x in found[field]] for field in fields]
        rows[split] = (list(zip(*columns)) if len(columns) > 1 else columns[0], found["label"].tolist())
    return _text(name.replace("/", "_"), model, rows, classes=classes, tokens=tokens)


def _text(
    name: str, where: str, rows: Mapping[str, tuple[list, list]], *, classes: int, tokens: int
) -> Problem:
    """Put a new classifier on a BERT, and turn texts into batches of one length."""
    folder = _folder(where)
    bare, params = models.load(folder)
    tokenizer = models.load_tokenizer(folder, bare)
    tokenizer.enable_truncation(tokens)
    config = {**bare.config, "architectures": ["BertForSequenceClassification"], "num_labels": classes}
    model = models.build(config)
    known = {f"bert.{n}": x for n, x in tree.flatten(params).items()}

    def base(seed: int) -> Params:
        fresh = model.init(jax.random.key(seed))
        return tree.map_named(lambda n, x: jax.numpy.asarray(known.get(n, x)), fresh)

    def batch(texts, labels) -> Batch:
        coded = tokenizer.encode_batch(texts)
        ids, kinds = np.zeros((2, len(coded), tokens), np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(coded):
            size = len(row.ids)
            ids[i, :size], kinds[i, :size], mask[i, :size] = row.ids, row.type_ids, 1
        labelled = {"labels": np.array(labels, np.int32)}
        return {"input_ids": ids, "token_type_ids": kinds, "attention_mask": mask, **labelled}

    return Problem(
        name,
        model,
        base,
        {s: batch(*r) for s, r in rows.items()},
        ("^classifier",),
        {"model": config, "tokens": tokens},
    )


def _folder(where: str) -> Path:
    import importlib.util

    if Path(where).is_dir():
        return Path(where)
    spec = importlib.util.find_spec(where) if where.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"`{where}` is neither a folder nor an installed package; see the gin file's first lines"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
