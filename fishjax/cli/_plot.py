"""`fishjax plot`: draw a Fisher or a mask."""

import argparse
from pathlib import Path

HELP = "draw a Fisher or a mask as PNG and SVG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["fisher", "mask"], help="histograms by layer; density by layer")
    parser.add_argument("path", metavar="FILE", help="the Fisher or mask file")
    parser.add_argument("--out", metavar="NAME", help="without an ending; default beside FILE")


def run(args: argparse.Namespace) -> None:
    from fishjax import checkpoint, plot

    out = args.out or str(Path(args.path).with_suffix(""))
    if args.what == "fisher":
        files = plot.fisher_histograms(checkpoint.load_fisher(args.path)[0], out)
    else:
        files = plot.mask_density(checkpoint.load_mask(args.path)[0], out)
    for file in files:
        print(file)
