"""Text to batches and back, through a folder's own tokenizer.json; nothing is looked up on a network."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishjax.errors import FileFormatError, StructureError, UsageError
from fishjax.models._model import Model, end_ids
from fishjax.models._sentencepiece import load_spiece


def load_tokenizer(folder: str | Path, model: Model) -> Any:
    """Return the `tokenizers.Tokenizer` of a model folder, of its tokenizer.json or T5's spiece.model.

    Raises:
      UsageError: the folder has no tokenizer, or the package `tokenizers` is not installed.
      FileFormatError: the tokenizer's file is malformed, or a link that leads out of the folder.
      StructureError: the tokenizer has ids that the model's embedding does not.
    """
    from fishjax.checkpoint._links import check_inside

    path, spiece = Path(folder) / "tokenizer.json", Path(folder) / "spiece.model"
    if not path.is_file() and not (spiece.is_file() and model.family == "t5"):
        raise UsageError(
            f"`{folder}` has no tokenizer.json; save the model's fast tokenizer with transformers into it"
        )
    check_inside(path if path.is_file() else spiece, Path(folder))
    try:
        import tokenizers
    except ImportError:
        raise UsageError("text needs the package `tokenizers`; install `fishjax[hf]`") from None
    if path.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it raises plain Exceptions
            raise FileFormatError(f"`{path}` is no tokenizer: {error}") from None
    else:
        path = spiece
        tokenizer = load_spiece(path, model.config["vocab_size"])
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= model.config["vocab_size"]:
        raise StructureError(
            f"`{path}` has ids up to {largest}, the model's embedding has {model.config['vocab_size']} rows; "
            "the tokenizer belongs to another model"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], model: Model) -> dict[str, np.ndarray]:
    """Return a right-padded batch of texts: `input_ids` and `attention_mask`, int32 `[B, T]`."""
    return pad([e.ids for e in tokenizer.encode_batch(list(texts))], model)


def pad(rows: Sequence[Sequence[int]], model: Model) -> dict[str, np.ndarray]:
    """Return rows of ids as a right-padded batch: `input_ids` and `attention_mask`, int32 `[B, T]`.

    Raises:
      UsageError: an empty row, or an id outside of the model's vocabulary.

    >>> from fishjax import models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "eos_token_id": 2}
    >>> model = models.build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> pad([[3, 1, 4], [1]], model)["attention_mask"].tolist()
    [[1, 1, 1], [1, 0, 0]]
    """
    size = model.config["vocab_size"]
    for i, row in enumerate(rows):
        if not len(row) or not all(0 <= token < size for token in row):
            raise UsageError(
                f"prompt {i} must have at least one token, with ids in [0, {size}); got {list(row)[:8]}"
            )
    fill = model.config.get("pad_token_id")
    ids = np.full((len(rows), max(map(len, rows))), 0 if fill is None else fill, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def until_end(ids: Sequence[int], model: Model) -> list[int]:
    """Return the ids before the first one that ends a sequence.

    >>> from fishjax import models
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "eos_token_id": 2}
    >>> model = models.build(config | {"n_layer": 1, "n_head": 2, "n_positions": 6})
    >>> until_end([3, 1, 2, 0], model)
    [3, 1]
    """
    ends = set(end_ids(model.config))
    return list(itertools.takewhile(lambda token: token not in ends, ids))
