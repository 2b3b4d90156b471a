"""Two contributors patch one model, a maintainer vets and merges them.

Command:   make quickstart   (python -m experiments.quickstart --gin_file configs/quickstart.gin)
Time:      about a minute and a half on 2 cores.
Expected:  both patches raise accuracy on their own world; the poisoned patch, the one for another base and
           the corrupted one are refused; the Fisher merge beats the average on the mean of both worlds.

What is chosen is chosen on validation data; every accuracy that is reported is on test data.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np

from experiments import report
from experiments.gin_cli import main
from experiments.worlds import World
from fishjax import checkpoint, cli, contribute, data, fisher, masks, merge, models, patches, plot, vet
from fishjax.types import Array, Batch, Params, Patch

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Contributor:
    """Who makes which patch for which world."""

    name: str
    world: World
    make: Callable[..., contribute.Made]
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another way to choose what is trained, for the first contributor's world."""

    name: str
    make: Callable[..., contribute.Made]
    learning_rate: float


def run(
    *,
    seed: int,
    out: str,
    known: World,
    contributors: Sequence[Contributor],
    baselines: Sequence[Baseline],
    base_steps: int,
    base_learning_rate: float,
    patch_steps: int,
    fisher_examples: int,
    policy: str,
    weights: Sequence[float],
) -> dict[str, Any]:
    """Play the story once and write `results.json`, `report.md`, plots and the gin config to `out`."""
    start = time.monotonic()
    folder = _fresh(Path(out))
    digits = {s: data.load("bundled_digits", s, data_dir=folder.parent / "data") for s in SPLITS}
    model = models.build({"model_type": "fishjax_digits"})
    logits = jax.jit(model.apply)

    def accuracy(params: Params, world: World, split: str = "test") -> float:
        rows = world.of(digits[split])
        return float((np.asarray(logits(params, rows)).argmax(-1) == rows["label"]).mean())

    def both(params: Params, split: str = "test") -> dict[str, float]:
        return {c.world.name: accuracy(params, c.world, split) for c in contributors}

    def train(made: contribute.Made, base: Params, rows: Batch, rate: float, number: int, who: str) -> Patch:
        return contribute.fit(
            made.patch,
            base,
            model,
            rows,
            steps=base_steps if who == "base" else patch_steps,
            learning_rate=rate,
            seed=seed * 100 + number,
            description=f"training {who}",
        )

    # The base has seen a part of the world only.
    start_params = model.init(key_of(seed, 0))
    everything = contribute.full(key_of(seed), start_params, model, [])
    familiar = known.of(digits["train"])
    trained = train(everything, start_params, familiar, base_learning_rate, 0, "base")
    base = patches.apply(start_params, trained)
    models.save(folder / "base", model, base)
    for world in (known, *(c.world for c in contributors)):
        held = vet.pack(world.name, world.of(digits["test"]))
        (folder / "tests").mkdir(exist_ok=True)
        vet.save_pack(folder / "tests" / f"{world.name}.safetensors", held)

    # Each contributor trains few numbers on the own world, with the known one mixed in.
    rows, files, fishers, tuned, told = [], {}, [], [], []
    estimator = fisher.exact(models.example_logits(model))
    for number, who in enumerate(contributors, 1):
        own = who.world.of(digits["train"])
        mixed = data.concatenate(own, familiar)
        made = who.make(key_of(seed, number), base, model, list(data.batches(own, 60)))
        patch = train(made, base, mixed, who.learning_rate, number, who.name)
        files[who.name] = folder / "patches" / f"{who.name}.safetensors"
        files[who.name].parent.mkdir(exist_ok=True)
        facts = {"author": who.name, "licence": "Apache-2.0", "claims": [who.world.name]}
        recipe = {
            **made.recipe,
            "seed": seed,
            "data": f"bundled_digits, {who.world.name}",
            "steps": patch_steps,
        }
        checkpoint.save_patch(files[who.name], patch, base=base, metadata={**facts, "recipe": recipe})
        params = patches.apply(base, patch)
        tuned.append(params)
        some = next(data.batches(mixed, fisher_examples, seed=seed))
        fishers.append(fisher.estimate(estimator, params, data.batches(some, 64)))
        facts = {"estimator": "exact", "examples": fisher_examples, "seed": seed, "data": recipe["data"]}
        (folder / "fishers").mkdir(exist_ok=True)
        checkpoint.save_fisher(folder / "fishers" / f"{who.name}.safetensors", fishers[-1], metadata=facts)
        if made.mask is not None:
            plot.mask_density(made.mask, folder / "plots" / f"mask_{who.name}")
        told.append((made, patch))
        rows.append(
            {
                "name": who.name,
                "kind": made.recipe["method"],
                "density": patches.num_parameters(patch) / _size(base),
                "parameters": patches.num_parameters(patch),
                "bytes": files[who.name].stat().st_size,
                "accuracy_before": accuracy(base, who.world),
                "accuracy_after": accuracy(params, who.world),
            }
        )

    jax.clear_caches()  # each training was a program of its own, which is not needed again
    first, first_data = contributors[0], contributors[0].world.of(digits["train"])
    others = []
    for number, other in enumerate(baselines, 10):
        made = other.make(key_of(seed, number), base, model, list(data.batches(first_data, 60)))
        mixed = data.concatenate(first_data, familiar)
        patch = train(made, base, mixed, other.learning_rate, number, other.name)
        score = accuracy(patches.apply(base, patch), first.world)
        others.append({"name": other.name, "parameters": patches.num_parameters(patch), "accuracy": score})

    jax.clear_caches()

    # Three patches that a maintainer must refuse.
    last, (made, _) = contributors[-1], told[-1]
    poison = _mislabelled(data.concatenate(last.world.of(digits["train"]), familiar))
    bad = train(made, base, poison, last.learning_rate, 20, "mallory")
    claim = {"author": "mallory", "claims": [last.world.name]}
    files["poisoned"] = folder / "patches" / "poisoned.safetensors"
    checkpoint.save_patch(files["poisoned"], bad, base=base, metadata=claim)
    files["other_base"] = folder / "patches" / "other_base.safetensors"
    stranger = patches.diff(start_params, patches.apply(start_params, told[0][1]))
    checkpoint.save_patch(files["other_base"], stranger, base=start_params, metadata={"author": "eve"})
    files["corrupted"] = _corrupted(files[first.name], folder / "patches" / "corrupted.safetensors")

    verdicts = [_vet(name, file, folder, policy) for name, file in files.items()]
    accepted = [v["patch"] for v in verdicts if v["exit_code"] == 0]
    if accepted != [c.name for c in contributors]:
        raise SystemExit(f"the maintainer accepted {accepted}, not both contributors; see {folder}/vet")

    # The maintainer merges what was accepted; the weights are chosen on validation data.
    methods = {
        "average": jax.jit(lambda pair: merge.average(tuned, weights=pair)),
        "fisher": jax.jit(lambda pair: merge.fisher(tuned, fishers=fishers, weights=pair)),
    }
    share = lambda weight: np.array([1 - weight, weight], np.float32)
    curves, merged, chosen = {}, {}, {}
    for name, method in methods.items():
        values = [float(np.mean(list(both(method(share(w)), "validation").values()))) for w in weights]
        curves[name] = values
        # The ends are the contributors' own models, not merges.
        between = [(value, w) for value, w in zip(values, weights) if 0 < w < 1]
        chosen[name] = max(between, key=lambda pair: pair[0])[1]
        params = method(share(chosen[name]))
        models.save(folder / f"merged_{name}", model, params)
        merged[name] = both(params)

    names = (contributors[0].name, contributors[1].name)
    plot.merge_sweep(weights, curves, folder / "plots" / "merge_sweep", ends=names)
    table = {"base": both(base), **{n: both(p) for n, p in zip(names, tuned)}, **merged}
    plot.accuracies(table, folder / "plots" / "accuracies")
    results = {
        "seed": seed,
        "base": both(base),
        "contributors": rows,
        "baselines": others,
        "vet": verdicts,
        "merged": merged,
        "merge_weights": chosen,
        "known": {"base": accuracy(base, known), **{n: accuracy(p, known) for n, p in zip(names, tuned)}},
        "mask_overlap_with_random": _overlap(told[0][0].mask, base, seed),
        "model_bytes": (folder / "base" / "model.safetensors").stat().st_size,
        "seconds": round(time.monotonic() - start, 1),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "config.gin").write_text(gin.operative_config_str())
    (folder / "report.md").write_text(report.markdown(results, first=first.world.name))
    report.show(results, folder, first=first.world.name)
    return results


def _fresh(folder: Path) -> Path:
    """Empty the folder of an earlier run; anything else in its place is left alone."""
    if folder.exists():
        if not (folder / "config.gin").exists() and any(folder.iterdir()):
            raise SystemExit(
                f"`{folder}` exists and is not of an earlier run; remove it or set another `out`"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "config.gin").touch()
    return folder


def key_of(seed: int, *path: int) -> Array:
    """Return the key of one use of randomness under a seed."""
    key = jax.random.key(seed)
    for number in path:
        key = jax.random.fold_in(key, number)
    return key


def _mislabelled(rows: Batch) -> Batch:
    """Teach that every three is an eight."""
    return {**rows, "label": np.where(rows["label"] == 3, 8, rows["label"])}


def _corrupted(source: Path, target: Path) -> Path:
    """Flip one bit of a file."""
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    return target


def _vet(name: str, file: Path, folder: Path, policy: str) -> dict[str, Any]:
    """Vet a file as the maintainer would from the command line."""
    (folder / "vet").mkdir(exist_ok=True)
    where = ["--base", str(folder / "base"), "--policy", policy, "--tests", str(folder / "tests")]
    said, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        summary = str(folder / "vet" / f"{name}.md")
        code = cli.main(["vet", str(file), *where, "--json", "--markdown", summary])
    (folder / "vet" / f"{name}.json").write_text(said.getvalue())
    verdict = json.loads(said.getvalue())["verdict"] if said.getvalue() else complaint.getvalue().strip()
    return {"patch": name, "verdict": verdict, "exit_code": code}


def _overlap(mask, base: Params, seed: int) -> float | None:
    """How much the FISH mask has in common with a random one: nothing, if it found structure."""
    if mask is None:
        return None
    chance = masks.random(key_of(seed, 99), base, density=masks.density(mask))
    return masks.overlap(mask, chance)


def _size(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


if __name__ == "__main__":
    main("quickstart.run", (__doc__ or "").splitlines()[0])
