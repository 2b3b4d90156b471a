"""`fishjax generate`: continue prompts with a model and its patches."""

import argparse
import json
from typing import Any

HELP = "continue prompts with a model, patched or not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", nargs="+", help="a text to continue")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        help="a patch file or a peft adapter folder, for all prompts; or again and again, one for each "
        "prompt, `none` for none: they run in one batch",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", help="cast the weights, for instance to bfloat16")
    parser.add_argument(
        "--quantise",
        metavar="FORMAT",
        help="keep the weights in int8, int4 or nf4; without patches one tensor at a time is in floats",
    )
    parser.add_argument("--ids", action="store_true", help="prompts and results are token ids: '3 1 4'")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    import jax

    from fishjax import models
    from fishjax.errors import UsageError

    # A patch is made for the weights of the file; these are cast and quantised when it has been checked.
    how = {"dtype": _dtype(args.dtype), "quantise": args.quantise}
    model, params = models.load(args.model, **({} if args.patch else how))
    if model.generate is None:
        raise UsageError(f"`{args.model}` is a `{model.family}` without a decoder; it cannot generate")
    tokenizer = None if args.ids else models.load_tokenizer(args.model, model)
    params, patch = _patched(args, model, params, **how) if args.patch else (params, None)
    if tokenizer is None:
        try:
            batch = models.pad([[int(i) for i in p.replace(",", " ").split()] for p in args.prompt], model)
        except ValueError as error:
            raise UsageError(f"with --ids a prompt is numbers with spaces between: {error}") from None
    else:
        batch = models.encode(tokenizer, args.prompt, model)
    out = model.generate(
        params,
        batch,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        key=jax.random.key(args.seed),
        patch=patch,
    )
    for prompt, row in zip(args.prompt, out.tolist()):
        ids = models.until_end(row, model)
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        print(
            json.dumps({"prompt": prompt, "text": text, "ids": ids}, ensure_ascii=False)
            if args.json
            else text
        )


def _patched(
    args: argparse.Namespace, model: Any, params: Any, dtype: Any, quantise: str | None
) -> tuple[Any, Any]:
    """Return parameters, with the one patch for all prompts in them, and the choice of one for each."""
    import jax

    from fishjax import leaves, patches
    from fishjax.errors import UsageError

    if len(args.patch) > 1 and len(args.patch) != len(args.prompt):
        raise UsageError(
            f"{len(args.patch)} patches do not go with {len(args.prompt)} prompts; give one --patch for all "
            "prompts, or one for each of them (`--patch none` for none)"
        )
    paths = list(dict.fromkeys(p for p in args.patch if p != "none"))
    made = [_load(path, model, params) for path in paths]
    selected = None
    if len(args.patch) == 1:
        params = patches.compose(params, made)
    elif made:
        ids = [-1 if p == "none" else paths.index(p) for p in args.patch]
        selected = patches.select(patches.stack(made), ids)
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return params if quantise is None else leaves.quantise(params, quantise), selected


def _dtype(name: str | None) -> Any:
    import jax.numpy as jnp

    from fishjax.errors import UsageError

    if name is None:
        return None
    try:
        dtype = jnp.dtype(name)
        assert jnp.issubdtype(dtype, jnp.floating)
    except (TypeError, AssertionError):
        raise UsageError(f"--dtype must be a floating dtype such as bfloat16; got `{name}`") from None
    return dtype


def _load(path: str, model: Any, params: Any) -> Any:
    """Read a patch for the base that it was made for."""
    from pathlib import Path

    from fishjax import checkpoint, tree

    if Path(path).is_dir():
        return checkpoint.load_peft(path, model, params)
    check_base(path, tree.flatten(params))
    return checkpoint.load_patch(path)[0]


def check_base(path: str, base: dict[str, Any]) -> None:
    """Raise unless each tensor that a patch touches is the one that it was made for."""
    from fishjax import checkpoint
    from fishjax.checkpoint._digest import leaf_digest
    from fishjax.errors import WrongBaseError

    for name, wanted in checkpoint.read_patch(path).base_digests.items():
        if name not in base or leaf_digest(name, base[name]) != wanted:
            raise WrongBaseError(
                f"`{path}` is for another base: `{name}` is not the one that it was made for"
            )
