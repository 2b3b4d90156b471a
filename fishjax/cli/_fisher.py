"""`fishjax fisher`: the diagonal Fisher information of a model on data."""

import argparse
import json
from typing import Any

HELP = "compute the diagonal Fisher information of a model on data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", required=True, help="a folder with config.json and weights")
    parser.add_argument(
        "--data", metavar="NAME|FILE.jsonl", required=True, help="a TFDS data set, or examples as JSON lines"
    )
    parser.add_argument("--split", default="train", help="of a TFDS data set, default train")
    parser.add_argument(
        "--estimator",
        choices=["empirical", "sampled", "exact"],
        default="empirical",
        help="labels of the data (default), labels drawn from the model, or all labels",
    )
    parser.add_argument(
        "--num-samples", type=int, metavar="K", help="of sampled: draws an example, default 1"
    )
    parser.add_argument(
        "--max-rows", type=int, metavar="N", help="of exact: the most backwards an example, default 256"
    )
    parser.add_argument("--examples", type=int, metavar="N", help="so many, drawn by the seed; default all")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="default 32")
    parser.add_argument("--chunk-size", type=int, metavar="N", help="examples at a time, default what fits")
    parser.add_argument("--memory", type=int, metavar="BYTES", help="that these may take, beside parameters")
    parser.add_argument("--seed", type=int, default=0, help="of the examples and of drawn labels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the file")
    parser.add_argument("--out", metavar="F", required=True, help="the Fisher file to write")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fishjax import checkpoint, contribute, data, fisher, models, tree
    from fishjax.errors import UsageError

    model, params = models.load(args.model)
    rows, data_id = contribute.read(args.data, args.model, model, split=args.split)
    size = data.examples(rows)
    if args.examples is not None:
        if not 1 <= args.examples <= size:
            raise UsageError(f"`--examples` must lie in [1, {size}]; got {args.examples}")
        kept = np.random.default_rng(args.seed).permutation(size)[: args.examples]
        rows, size = {name: x[kept] for name, x in rows.items()}, args.examples

    options = _options(args)
    if args.estimator == "empirical":
        estimator = fisher.empirical(models.example_loss(model), **options)
    else:
        make: Any = {"sampled": fisher.sampled, "exact": fisher.exact}[args.estimator]
        estimator = make(models.example_logits(model), token_mask=model.token_mask, **options)
    batches = list(data.batches(rows, min(args.batch_size, size)))
    result = fisher.estimate(estimator, params, batches, key=jax.random.key(args.seed))
    recipe = {
        "estimator": args.estimator,
        "examples": size,
        "seed": args.seed,
        "data": data_id,
        "base": checkpoint.digest(params),
    }
    if "num_samples" in options:
        recipe["num_samples"] = options["num_samples"]
    cast = jax.tree.map(lambda x: np.asarray(x.astype(jnp.dtype(args.dtype))), result)
    digest = checkpoint.save_fisher(args.out, cast, metadata=recipe)
    entries = sum(x.size for x in tree.flatten(result).values())
    if args.json:
        print(json.dumps({"out": args.out, "entries": entries, "digest": digest, "recipe": recipe}))
    else:
        print(f"{args.out}: {entries:,} entries from {size:,} examples, {digest}")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of the estimator's own arguments."""
    from fishjax.errors import UsageError

    for name, of in (("num_samples", "sampled"), ("max_rows", "exact")):
        if getattr(args, name) is not None and args.estimator != of:
            flag = f"`--{name.replace('_', '-')}`"
            raise UsageError(f"{flag} is of `--estimator {of}`; got `--estimator {args.estimator}`")
    names = ("num_samples", "max_rows", "chunk_size", "memory")
    return {name: value for name in names if (value := getattr(args, name)) is not None}
