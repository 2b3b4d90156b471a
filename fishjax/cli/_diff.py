"""`fishjax diff`: the patch between two models."""

import argparse
import json

HELP = "write the patch that turns one model into another, bit for bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="a .safetensors file or a Hugging Face folder")
    parser.add_argument("tuned", metavar="TUNED", help="the changed model, with the same tensors")
    parser.add_argument("--out", metavar="PATCH", required=True, help="the patch file to write")
    parser.add_argument(
        "--lossy", choices=["bf16", "int8"], help="fewer bytes, no longer exact; `inspect` tells the error"
    )
    parser.add_argument("--author", help="who made the change")
    parser.add_argument("--licence", help="an SPDX identifier")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    from fishjax import checkpoint

    said = {"author": args.author, "licence": args.licence}
    metadata = {key: value for key, value in said.items() if value is not None}
    done = checkpoint.diff_files(args.base, args.tuned, args.out, metadata=metadata, lossy=args.lossy)
    if args.json:
        print(json.dumps({"out": args.out, **done._asdict()}))
    else:
        print(
            f"{args.out}: {done.changed:,} of {done.entries:,} entries in {done.leaves} tensors, "
            f"{done.bytes:,} bytes, {done.digest}"
        )
