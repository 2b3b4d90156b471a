"""`fishjax convert`: models between Hugging Face and Orbax folders, patches to and from peft adapters."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

HELP = "convert a model (hf, orbax) or a patch (peft, patch) into another format"

# Beside the weights, what a model folder needs to be loaded again.
_CARRIED: tuple[str, ...]
_CARRIED = ("*config.json", "*.jinja", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")
_CARRIED += ("spiece.model", "*.md", "LICENSE*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="DIR", help="a model folder or .safetensors file; a patch or adapter"
    )
    parser.add_argument("out", metavar="OUT", help="a new folder (a new file for --to patch)")
    parser.add_argument("--to", required=True, choices=("hf", "orbax", "peft", "patch"))
    parser.add_argument("--model", help="for peft and patch: the model folder that it is for")
    parser.add_argument("--dtype", help="for hf and orbax: cast the weights, for instance to bfloat16")


def run(args: argparse.Namespace) -> None:
    from fishjax.checkpoint._atomic import refuse_existing
    from fishjax.errors import UsageError

    refuse_existing(args.out)
    if args.to in ("peft", "patch"):
        if args.model is None or args.dtype is not None:
            raise UsageError(
                f"--to {args.to} needs --model, the folder that the patch is for, and no --dtype"
            )
        _adapter(args)
    elif args.model is not None:
        raise UsageError("--model is for --to peft and --to patch")
    else:
        _weights(args)


def _adapter(args: argparse.Namespace) -> None:
    from fishjax import checkpoint, models, tree

    model, params = models.load(args.model)
    if args.to == "patch":
        patch = checkpoint.load_peft(args.source, model, params)
        digest = checkpoint.save_patch(args.out, patch, base=checkpoint.load_params(args.model))
        print(f"{args.out}: {len(patch)} tensors changed, {digest}")
        return
    from fishjax.cli._generate import check_base

    patch, _ = checkpoint.load_patch(args.source)
    check_base(args.source, tree.flatten(params))
    checkpoint.save_peft(args.out, patch, model, params=params)
    print(f"{args.out}: an adapter of {len(patch)} tensors")


def _weights(args: argparse.Namespace) -> None:
    from fishjax import checkpoint, tree
    from fishjax.checkpoint._config import CONFIG, read_json, rewrite
    from fishjax.checkpoint._links import inside

    source, out = Path(args.source), Path(args.out)
    params = checkpoint.load_params(source)
    if args.dtype is not None:
        dtype = _floating(args.dtype)
        if (source / CONFIG).is_file():
            read_json(source / CONFIG)  # malformed, it is told before anything is written
        params = tree.map_named(lambda n, x: x.astype(dtype) if _is_float(x) else x, params)
    checkpoint.save_params(out, params, layout=args.to)
    if source.is_dir():
        for path in sorted({p for pattern in _CARRIED for p in source.glob(pattern)}):
            if path.is_file() and inside(path, source):
                shutil.copyfile(path, out / path.name)
            else:
                print(f"left out `{path.name}`: a folder, or a link out of this one", file=sys.stderr)
    if (out / CONFIG).exists():
        rewrite(out / CONFIG, dtype=args.dtype)
    print(f"{args.out}: {len(tree.names(params))} tensors, {checkpoint.digest(params)}")


def _is_float(x: Any) -> bool:
    return "float" in x.dtype.name  # bfloat16 and float8, which have no kind of their own, included


def _floating(name: str) -> Any:
    import ml_dtypes
    import numpy as np

    from fishjax.errors import UsageError

    known = {
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float64": np.float64,
    }
    if name not in known:
        raise UsageError(f"--dtype must be one of {', '.join(known)}; got `{name}`")
    return np.dtype(known[name])
