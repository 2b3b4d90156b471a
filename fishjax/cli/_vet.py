"""`fishjax vet`: hold a patch to a policy; the exit code is the answer."""

import argparse
import sys
from pathlib import Path

HELP = "check a patch against its base, held tests and a policy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patch", metavar="PATCH", nargs="?", help="the patch file")
    parser.add_argument("--base", metavar="BASE", help="model folder (config.json), or a .safetensors file")
    parser.add_argument("--policy", metavar="YAML", help="the maintainer's limits")
    parser.add_argument(
        "--tests", metavar="DIR", help="folder of held test packs (NAME.safetensors, NAME.jsonl)"
    )
    parser.add_argument(
        "--downstream",
        metavar="DIR",
        help="folder of accepted task patches, tried again on the changed model",
    )
    parser.add_argument("--fisher", metavar="F", help="diagonal Fisher of the base, to rank the layers by")
    parser.add_argument("--json", action="store_true", help="print the report for machines")
    parser.add_argument("--markdown", metavar="FILE", help="write a summary in Markdown")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML")
    parser.add_argument(
        "--init",
        metavar="YAML",
        nargs="?",
        const="vet.yaml",
        help="write a policy with every key explained, and stop",
    )


def run(args: argparse.Namespace) -> int:
    from fishjax import vet
    from fishjax.checkpoint import load_fisher
    from fishjax.errors import UsageError

    if args.init is not None:
        return _init(Path(args.init))
    if args.patch is None or args.base is None:
        raise UsageError("give PATCH and --base BASE; see `fishjax vet --help`")
    # Who gives neither a policy nor tests asks only whether the patch is whole and fits.
    policy = vet.load_policy(args.policy) if args.policy else vet.Policy(require_tests=bool(args.tests))
    tests = vet.load_packs(args.tests, model=args.base) if args.tests else ()
    fisher = load_fisher(args.fisher)[0] if args.fisher else None
    report = vet.files(
        args.patch, args.base, policy=policy, tests=tests, fisher=fisher, downstream=args.downstream
    )
    name = Path(args.patch).name
    for path, text in ((args.markdown, vet.to_markdown), (args.junit, vet.to_junit)):
        if path:
            _write(Path(path), text(report, patch=name))
    print(vet.to_json(report, patch=name) if args.json else vet.to_text(report, patch=name))
    if report.exit_code:
        sys.stdout.flush()
        decisive = [f"{f.name}: {f.summary}" for f in report.findings if f.exit_code == report.exit_code]
        line = f"fishjax: `{name}`: {report.verdict} ({report.exit_code}): {'; '.join(decisive)}"
        print("".join(c for c in line if c.isprintable()), file=sys.stderr)
    return report.exit_code


def _init(path: Path) -> int:
    from fishjax import vet
    from fishjax.errors import UsageError

    if path.exists():
        raise UsageError(f"`{path}` exists already; give another name or remove it first")
    _write(path, vet.TEMPLATE)
    print(f"wrote {path}")
    return 0


def _write(path: Path, text: str) -> None:
    from fishjax.checkpoint._atomic import atomic_file, write_all

    with atomic_file(path) as fd:
        write_all(fd, text.encode())
