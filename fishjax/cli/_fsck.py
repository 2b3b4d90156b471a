"""`fishjax fsck`: verify files."""

import argparse
import json

HELP = "verify the header and digests of a file, or of every file in a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a file or a folder, searched to the bottom")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    from fishjax import checkpoint

    findings = checkpoint.fsck(args.path)
    bad = [f for f in findings if f.problem]
    other = sum(f.kind == "other" for f in findings)
    if args.json:
        print(json.dumps({"files": [f._asdict() for f in findings], "bad": len(bad)}, indent=2))
    else:
        for finding in findings:
            mark = "BAD" if finding.problem else "-- " if finding.kind == "other" else "ok "
            print(f"{mark}  {finding.kind:<8} {finding.problem or finding.path}")
        print(f"{len(findings) - other} files checked, {len(bad)} bad, {other} of other formats not checked")
    return 3 if bad else 0
