"""`fishjax mask`: the entries that a patch shall train."""

import argparse
import json

HELP = "keep the entries with the largest Fisher information"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fisher", metavar="F", required=True, help="a Fisher file")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--density", type=float, help="the fraction to keep, in (0, 1]")
    budget.add_argument("--rank", type=int, help="keep r (m + n) entries of each matrix, as SHiRA does")
    parser.add_argument(
        "--scope", choices=["global", "layer", "leaf"], default="global", help="where to rank"
    )
    parser.add_argument("--minimum", type=int, default=0, help="keep at least so many entries of each tensor")
    for rule, what in {
        "include": "rank only tensors whose name matches",
        "exclude": "keep nothing of tensors whose name matches",
        "always": "keep all of tensors whose name matches, within the same budget",
    }.items():
        parser.add_argument(f"--{rule}", metavar="REGEX", action="append", help=f"{what}; repeatable")
    parser.add_argument("--out", metavar="MASK", required=True, help="the mask file to write")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    from fishjax import checkpoint, masks, tree

    fisher, metadata = checkpoint.load_fisher(args.fisher)
    rules = ("density", "rank", "scope", "minimum", "include", "exclude", "always")
    options = {rule: getattr(args, rule) for rule in rules}
    kept = masks.indices(fisher, **options)
    leaves = tree.flatten(fisher)
    none: list[int] = []
    chosen = {name: (x.shape, kept.get(name, none)) for name, x in leaves.items()}
    recipe = {"method": "topk", **options, "fisher": metadata}
    digest = checkpoint.write_mask(args.out, chosen, metadata={"recipe": recipe})
    count, entries = sum(map(len, kept.values())), sum(x.size for x in leaves.values())
    if args.json:
        print(json.dumps({"out": args.out, "kept": count, "entries": entries, "digest": digest}))
    else:
        print(f"{args.out}: {count:,} of {entries:,} entries kept, {digest}")
