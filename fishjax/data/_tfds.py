"""Read a TFDS data set into arrays, without TensorFlow."""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np

from fishjax.errors import FileFormatError, UsageError
from fishjax.types import Batch


def load(name: str, split: str, *, data_dir: str | Path | None = None) -> Batch:
    """Return a split of a TFDS data set as arrays with a leading axis of examples.

    Args:
      name: `"bundled_digits"`, or any TFDS name whose features are arrays and labels of fixed shape.
      split: as in TFDS: `"train"`, `"test[:10%]"`.
      data_dir: where TFDS keeps its files; default `$FISHJAX_DATA_DIR`, else `~/.cache/fishjax`.

    Raises:
      UsageError: tensorflow-datasets is not installed, or it knows no such data set or split.
      FileFormatError: the files hold fewer examples than they declare.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UsageError('`data.load` needs tensorflow-datasets: pip install "fishjax[data]"') from None
    if name == "bundled_digits":
        import fishjax.data._digits  # noqa: F401  (a builder is known to TFDS once it is imported)

    folder = Path(data_dir or os.environ.get("FISHJAX_DATA_DIR", "~/.cache/fishjax")).expanduser()
    try:
        # The default tfrecord needs TensorFlow, and parquet loses rows.
        builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
        if not builder.is_prepared():
            print(f"preparing `{name}` in {folder}", file=sys.stderr)
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(None):  # it prints to stdout, which is for results
                builder.download_and_prepare()
        source = builder.as_data_source(split=split)
    except (tfds.core.DatasetNotFoundError, KeyError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UsageError(f"data set `{name}`, split `{split}` cannot be read: {first_line}") from None
    if "[" not in split and len(source) != builder.info.splits[split].num_examples:
        raise FileFormatError(
            f"split `{split}` of `{name}` holds {len(source)} examples where "
            f"{builder.info.splits[split].num_examples} are declared; remove `{folder / name}` and try again"
        )
    rows = source.__getitems__(range(len(source)))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
