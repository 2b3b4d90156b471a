"""`fishjax plot`: draw a Fisher, a mask, or where a model's leaves lie on a mesh."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fishjax.errors import UsageError

HELP = "draw a Fisher, a mask, or a model's layout on a mesh as PNG and SVG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["fisher", "mask", "mesh"],
        help="by layer: histograms, density; what sits where",
    )
    parser.add_argument("path", metavar="PATH", help="the Fisher or mask file; the model folder")
    parser.add_argument("--out", metavar="NAME", help="without an ending; default beside PATH")
    parser.add_argument(
        "--axes",
        metavar="AXIS=N",
        nargs="+",
        help="of the mesh: data, fsdp, tensor; the devices need not be there. The table goes to stdout",
    )


def run(args: argparse.Namespace) -> None:
    from fishjax import checkpoint, plot

    if (args.what == "mesh") != bool(args.axes):
        raise UsageError("`plot mesh` needs `--axes`, such as `--axes fsdp=4 tensor=2`; the others take none")
    path = Path(args.path)
    if args.what == "fisher":
        files = plot.fisher_histograms(checkpoint.load_fisher(path)[0], args.out or path.with_suffix(""))
    elif args.what == "mask":
        files = plot.mask_density(checkpoint.load_mask(path)[0], args.out or path.with_suffix(""))
    else:
        files = _mesh(path, args.out or f"{path}-mesh", args.axes)
    for file in files:
        print(file)


def _mesh(path: Path, out: str, axes: Sequence[str]) -> list[Path]:
    """Print the table of a model folder on a mesh, and draw it.

    Only headers are read; without weights, all is taken for float32 as config.json describes it.
    """
    import jax
    from jax.sharding import AbstractMesh

    from fishjax import checkpoint, mesh, models, plot, tree
    from fishjax.models._folder import read_config

    sizes = {}
    for text in axes:
        name, _, size = text.partition("=")
        if not (name and size.isdigit() and int(size) > 0 and name not in sizes):
            raise UsageError(f"`--axes` must be AXIS=N, each axis once and N at least 1; got `{text}`")
        sizes[name] = int(size)
    config, specs = read_config(path / "config.json"), None
    if any(path.glob("model*.safetensors*")):
        with checkpoint.open_params(path) as files:
            specs = files.specs
    model = models.build(config, specs)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    dtype = lambda name, x: specs[name].dtype if specs and name in specs else x.dtype
    params = tree.map_named(lambda n, x: jax.ShapeDtypeStruct(x.shape, dtype(n, x)), shapes)
    on = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    table = mesh.table(params, mesh.rules(model, on), on)
    print(table)
    return plot.mesh_table(table, out)
