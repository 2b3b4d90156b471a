"""`fishjax mask`: the entries that a patch shall train."""

import argparse
import json

HELP = "keep the entries with the largest Fisher information"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fisher", metavar="F", required=True, help="a Fisher file")
    parser.add_argument("--density", type=float, required=True, help="the fraction to keep, in (0, 1]")
    parser.add_argument("--scope", choices=["global", "leaf"], default="global", help="where to rank")
    for rule, what in {
        "include": "rank only tensors whose name matches",
        "exclude": "keep nothing of tensors whose name matches",
        "always": "keep all of tensors whose name matches, within the same budget",
    }.items():
        parser.add_argument(f"--{rule}", metavar="REGEX", action="append", help=f"{what}; repeatable")
    parser.add_argument("--out", metavar="MASK", required=True, help="the mask file to write")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    import numpy as np

    from fishjax import checkpoint, masks, tree

    fisher, metadata = checkpoint.load_fisher(args.fisher)
    mask = masks.topk(
        fisher,
        density=args.density,
        scope=args.scope,
        include=args.include,
        exclude=args.exclude,
        always=args.always,
    )
    recipe = {
        "method": "topk",
        "density": args.density,
        "scope": args.scope,
        "include": args.include,
        "exclude": args.exclude,
        "always": args.always,
        "fisher": metadata,
    }
    digest = checkpoint.save_mask(args.out, mask, metadata={"recipe": recipe})
    leaves = tree.flatten(mask).values()
    kept, entries = sum(int(np.count_nonzero(x)) for x in leaves), sum(x.size for x in leaves)
    if args.json:
        print(json.dumps({"out": args.out, "kept": kept, "entries": entries, "digest": digest}))
    else:
        print(f"{args.out}: {kept:,} of {entries:,} entries kept, {digest}")
