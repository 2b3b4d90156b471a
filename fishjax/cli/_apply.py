"""`fishjax apply`: a patch and its base make a model."""

import argparse
import json
import sys

HELP = "apply a patch to the model that it was made for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patch", metavar="PATCH", help="a patch file")
    parser.add_argument("--base", required=True, help="a .safetensors file or a Hugging Face folder")
    parser.add_argument("--out", required=True, help="a new .safetensors file, or a new folder")
    parser.add_argument(
        "--touched-only",
        action="store_true",
        help="check only the tensors that the patch changes; the base may differ elsewhere, "
        "as after another patch",
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    from fishjax import checkpoint

    done = checkpoint.apply_file(args.patch, args.base, args.out, touched_only=args.touched_only)
    for path in done.left_out:
        print(f"left out `{path}`: other weights, a link out of it or a hidden folder", file=sys.stderr)
    if args.json:
        print(json.dumps({"out": args.out, **done._asdict()}))
    else:
        print(f"{args.out}: {done.changed} of {done.leaves} tensors changed, {done.digest}")
