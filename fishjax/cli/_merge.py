"""`fishjax merge`: several models make one, by a method and its options or by a recipe."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HELP = "merge models: by a method and options, or by a recipe (RECIPE.yaml OUT)"

_NEGATIVE = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?$|-(?:inf|nan)$", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What looks like a negative number is a value: argparse itself takes `-1e-1` for an option.
    parser._negative_number_matcher = _NEGATIVE
    parser.add_argument("paths", metavar="PATH", nargs="*", help="models; or RECIPE.yaml OUT")
    parser.add_argument(
        "--method",
        help="what to do, for instance average, fisher or ties; patches and information make a patch",
    )
    parser.add_argument("--methods", action="store_true", help="list the methods and their options")
    parser.add_argument("--out", help="a new .safetensors file, or a new folder")
    parser.add_argument("--base", help="the model that all others started from")
    parser.add_argument("--weights", nargs="+", metavar="W", help="one a model")
    parser.add_argument("--fishers", nargs="+", metavar="F", help="Fisher files, one a model")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="K=V", help="other options, as YAML values"
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        default=[],
        metavar="REGEX=I",
        help="take leaves whole from model I (0 is the first; `none`: merge them); the first match wins",
    )
    parser.add_argument("--dtype", help="of the output, for instance bfloat16; by default as it is")
    parser.add_argument("--no-digests", action="store_true", help="do not compute content ids (faster)")
    parser.add_argument("--dry-run", action="store_true", help="say what it will read, write and hold")
    parser.add_argument(
        "--explain", action="store_true", help="merge nothing; show where models or patches for --base clash"
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    from fishjax import merge
    from fishjax.errors import UsageError

    _give_back_models(args)
    if args.methods:
        _list_methods(args.json)
        return
    if args.explain:
        _explain(args)
        return
    if args.method is None and args.paths and Path(args.paths[0]).suffix in (".yaml", ".yml"):
        _refuse_options(args)
        recipe, *rest = args.paths
        out, *more = [*rest, *([args.out] if args.out else [])] or [None]
        if more or (out is None and not args.dry_run):
            raise UsageError("a recipe wants one output: RECIPE.yaml OUT")
        if args.dry_run:
            cost = merge.estimate_recipe(recipe, out, digests=not args.no_digests)
            _report(cost._asdict(), args.json)
            return
        digest = merge.run_recipe(recipe, out, digests=not args.no_digests)
        _report({"out": out, "digest": digest}, args.json)
        return
    if args.method is None:
        raise UsageError("give --method M and models, or RECIPE.yaml OUT; --methods lists the methods")
    if not args.paths:
        raise UsageError("give the models to merge")
    options = _options(args)
    if args.method in merge.PATCH_METHODS:
        if args.dry_run or args.out is None:
            raise UsageError(
                f"`{args.method}` writes a patch file, of a size that only merging tells; give --out, and no "
                "--dry-run"
            )
        digest = merge.merge_patches(args.method, args.paths, args.out, **options)
        _report({"out": args.out, "digest": digest}, args.json)
        return
    options |= {"digests": not args.no_digests}
    if args.dry_run:
        _report(merge.estimate(args.method, args.paths, out=args.out, **options)._asdict(), args.json)
        return
    if args.out is None:
        raise UsageError("give --out")
    digest = merge.files(args.method, args.paths, args.out, **options)
    _report({"out": args.out, "digest": digest}, args.json)


def _explain(args: argparse.Namespace) -> None:
    from fishjax.errors import UsageError
    from fishjax.merge import _explain

    if args.base is None or not args.paths:
        raise UsageError("--explain wants --base BASE and models, or patches for it")
    if given := [n for n in ("method", "out", "set", "dtype", "dry_run") if getattr(args, n)]:
        option = given[0].replace("_", "-")
        raise UsageError(f"--explain shows where models clash whatever merges them; leave out --{option}")
    weights = None if args.weights is None else [_number(text) for text in args.weights]
    keep = [_keep(pair) for pair in args.keep]
    found = _explain.explain_files(args.base, args.paths, fishers=args.fishers, weights=weights, keep=keep)
    if args.json:
        layers = {layer: clash._asdict() for layer, clash in found.layers.items()}
        print(json.dumps({"layers": layers, "total": found.total._asdict(), "skipped": found.skipped}))
    else:
        print(_explain.table(found, [Path(p).stem for p in args.paths]))


def _give_back_models(args: argparse.Namespace) -> None:
    """Models that follow `--weights 1 2`, `--set k=v` or `--keep r=0` were taken for more of those."""

    def is_number(text: str) -> bool:
        try:
            return float(text) is not None
        except ValueError:
            return False

    for name, belongs in (("weights", is_number), ("set", lambda t: "=" in t), ("keep", lambda t: "=" in t)):
        given = getattr(args, name) or []
        count = next((i for i, text in enumerate(given) if not belongs(text)), len(given))
        if 0 < count < len(given):
            setattr(args, name, given[:count])
            args.paths += given[count:]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from fishjax.errors import UsageError
    from fishjax.merge import find_dtype
    from fishjax.merge._files import RESERVED

    options: dict[str, Any] = {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set wants K=V; got `{pair}`")
        if key in (*RESERVED, "method", "base", "weights", "keep", "dtype"):
            raise UsageError(f"--set {key} is no option of a method; see `fishjax merge --help`")
        if key in options:
            raise UsageError(f"--set {key} is given twice; a list is written `{key}=[a, b]`")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"--set {key}: `{value}` is not a YAML value ({error})") from None
    for key in ("base", "weights", "fishers"):
        if getattr(args, key) is not None:
            options[key] = getattr(args, key)
    if "weights" in options:
        options["weights"] = [_number(text) for text in args.weights]
    if args.dtype is not None:
        options["dtype"] = find_dtype(args.dtype)
    if args.keep:
        options["keep"] = [_keep(pair) for pair in args.keep]
    return options


def _number(text: str) -> float:
    from fishjax.errors import UsageError

    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--weights wants numbers; got `{text}`") from None


def _keep(pair: str) -> tuple[str, int | None]:
    from fishjax.errors import UsageError

    pattern, equals, model = pair.rpartition("=")
    if not equals or not (model == "none" or model.isdigit()):
        raise UsageError(f"--keep wants REGEX=I with the number of a model, or REGEX=none; got `{pair}`")
    return pattern, None if model == "none" else int(model)


def _refuse_options(args: argparse.Namespace) -> None:
    from fishjax.errors import UsageError

    given = [n for n in ("base", "weights", "fishers", "set", "keep", "dtype") if getattr(args, n)]
    if given:
        raise UsageError(f"with a recipe, --{given[0]} belongs in the recipe")


def _list_methods(as_json: bool) -> None:
    import inspect

    from fishjax import merge

    table = {}
    functions = {name: getattr(merge, name) for name in merge.METHODS} | merge.PATCH_METHODS
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters
        table[name] = {
            n: "required" if p.default is inspect.Parameter.empty else p.default
            for n, p in parameters.items()
            if n not in ("models", "inputs", "out", "keep")
        }
    if as_json:
        print(json.dumps(table))
        return
    for name, options in table.items():
        print(name, *(f"{k}={v}" for k, v in options.items()))


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    elif "digest" in result:
        print(f"{result['out']}: {result['digest'] or 'merged'}")
    else:
        sizes = {k: f"{v / 1e6:.1f} MB" for k, v in result.items()}
        print(
            f"reads {sizes['read']}, writes {sizes['write']}, holds about {sizes['memory']}", file=sys.stdout
        )
