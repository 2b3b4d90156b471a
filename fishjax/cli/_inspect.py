"""`fishjax inspect`: what is in a file or folder."""

import argparse
import json

HELP = "show what a model, patch, Fisher or mask holds, and its content id"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a .safetensors file or a Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--no-id", action="store_true", help="skip a model's content id, which reads all of it"
    )


def run(args: argparse.Namespace) -> None:
    from fishjax import checkpoint

    report = checkpoint.inspect(args.path, content_id=not args.no_id)
    if args.json:
        print(json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False))
        return
    tensors = report.pop("tensors")
    wide = max([len(t["name"]) for t in tensors] + [6])
    print(f"{'tensor':<{wide}}  {'dtype':<8} {'bytes':>14}  shape")
    for t in tensors:
        print(f"{t['name']:<{wide}}  {t['dtype']:<8} {t['bytes']:>14,}  {t['shape']}")
    for key, value in report.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name}: {item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)}")
        else:
            print(f"{key}: {f'{value:,}' if isinstance(value, int) else value}")
