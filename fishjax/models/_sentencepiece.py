"""A T5 folder's `spiece.model` as a fast tokenizer, for folders that have nothing else.

The file is a protocol buffer, of which a few fields are needed; it holds no code.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fishjax.errors import FileFormatError

UNIGRAM, CONTROL = 1, 3  # of the enumerations in sentencepiece_model.proto
EXTRA_IDS = 100  # the sentinels of span corruption, behind the pieces and counted down


def load_spiece(path: Path, size: int) -> Any:
    """Return the `tokenizers.Tokenizer` that a T5 `spiece.model` describes.

    Args:
      size: how many rows the embedding has; sentinels are added as far as they fit.

    Raises:
      FileFormatError: the file is malformed, or no unigram model.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    data = path.read_bytes()
    try:
        top = list(_fields(data))
        entries = [dict(_fields(value)) for number, value in top if number == 1]
        trainer = dict(_fields(next(value for number, value in top if number == 2)))
        normal = dict(_fields(next((value for number, value in top if number == 3), b"")))
        pieces = [(e[1].decode(), struct.unpack("<f", e.get(2, bytes(4)))[0]) for e in entries]
    except (
        ValueError,
        KeyError,
        IndexError,
        StopIteration,
        TypeError,
        AttributeError,
        struct.error,
    ) as error:
        raise FileFormatError(f"`{path}` is no SentencePiece model: {error!r}") from None
    if trainer.get(3, UNIGRAM) != UNIGRAM or not pieces:
        raise FileFormatError(f"`{path}` is no unigram model; save its folder with a tokenizer.json")
    unknown = trainer.get(40, 0)
    extra = min(EXTRA_IDS, max(size - len(pieces), 0))
    names = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    tokenizer = Tokenizer(models.Unigram(pieces + [(n, 0.0) for n in names], unk_id=unknown))
    steps: list[Any] = [normalizers.Precompiled(normal[2])] if normal.get(2) else []
    if normal.get(4, 1):  # remove extra whitespace
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if normal.get(3, 1) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = [p for (p, _), e in zip(pieces, entries) if e.get(3, 1) == CONTROL]
    tokenizer.add_special_tokens([*special, pieces[unknown][0], *names])
    end = trainer.get(42, 2)
    if end < len(pieces):
        name = pieces[end][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {name}", pair=f"$A {name} $B {name}", special_tokens=[(name, end)]
        )
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield `(field number, value)` of a protocol buffer message: integers, or bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number is longer than 64 bits")

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} is not known")
        length = varint() if kind == 2 else 8 if kind == 1 else 4
        if at + length > len(data):
            raise ValueError("a field is longer than the file")
        yield tag >> 3, data[at : at + length]
        at += length
