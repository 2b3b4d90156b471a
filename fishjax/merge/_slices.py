"""Slices of models, as mergekit's recipes have them: which tensors make each tensor of the output."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fishjax.errors import UsageError
from fishjax.merge._blocks import Readable
from fishjax.tree import check_names

LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")
_EMBEDDING = re.compile(r"(?i)emb|\bwte\b|\bwpe\b|\bshared\b")  # what comes before the layers


class Source(NamedTuple):
    """One model's part in a slice of the output."""

    path: Path
    tensors: Mapping[str, Readable]
    first: int | None  # its first layer here; None: all of them
    settings: Mapping[str, Any]
    is_base: bool


class Slice(NamedTuple):
    """Some layers of the output, and what they are made of."""

    sources: Sequence[Source]
    layers: int | None  # how many; None: all
    settings: Mapping[str, Any]


def output_tensors(slices: Sequence[Slice]) -> Iterator[tuple[str, float, Slice, list[Readable]]]:
    """Yield every output tensor: its name, its depth in [0, 1], its slice, and the tensors it is made of.

    Raises:
      StructureError: the sources of a slice do not have the same tensors.
    """
    head, tail = slices[0], slices[-1]
    ends = [*head.sources, *tail.sources]
    loose = [{n: t for n, t in s.tensors.items() if not LAYER.match(n)} for s in ends]
    _check_names(ends, loose)
    for name in loose[0]:
        piece = head if _EMBEDDING.search(name) else tail
        yield name, 0.0, piece, [s.tensors[name] for s in piece.sources]
    offset = 0
    for piece in slices:
        parts = [_layers(s, piece.layers) for s in piece.sources]
        _check_names(piece.sources, parts)
        depths: dict[str, int] = {}
        found = {name: _layer(name) for name in parts[0]}
        for prefix, place, _ in found.values():
            depths[prefix] = max(depths.get(prefix, 0), place + 1)
        for name, (prefix, place, rest) in found.items():
            layers = depths[prefix] if piece.layers is None else piece.layers
            t = place / (layers - 1) if layers > 1 else 1.0
            yield f"{prefix}{offset + place}{rest}", t, piece, [part[name] for part in parts]
        offset += piece.layers or 0


def _layer(name: str) -> tuple[str, int, str]:
    """Return what comes before the number of a tensor's layer, that number, and what comes behind it."""
    found = LAYER.match(name)
    assert found is not None
    return found[1], int(found[2]), found[3]


def _layers(source: Source, count: int | None) -> dict[str, Readable]:
    """Return the tensors of a source's layers, counted from its first one here on."""
    layers = {n: (t, *_layer(n)) for n, t in source.tensors.items() if LAYER.match(n)}
    start, stacks = source.first or 0, sorted({prefix for _, prefix, _, _ in layers.values()})
    if count is not None:
        if len(stacks) != 1:
            raise UsageError(f"`slices` need a model with one stack of layers; got {', '.join(stacks)}")
        there = 1 + max(i for _, _, i, _ in layers.values())
        if there < start + count:
            raise UsageError(f"`{source.path}` has {there} layers; `layer_range` goes to {start + count}")
    return {
        f"{prefix}{i - start}{rest}": t
        for t, prefix, i, rest in layers.values()
        if count is None or start <= i < start + count
    }


def _check_names(sources: Sequence[Source], tensors: Sequence[Mapping[str, Readable]]) -> None:
    for i, (source, found) in enumerate(zip(sources[1:], tensors[1:], strict=True), 1):
        if found.keys() != tensors[0].keys():
            what = (
                f"`{sources[0].path}`",
                f"`{source.path}`" if source.path != sources[0].path else f"source {i}",
            )
            check_names(dict.fromkeys(tensors[0], 0), dict.fromkeys(found, 0), what)
