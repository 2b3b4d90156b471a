"""T-Few at the size of a laptop: few shots of held-out tasks for a small T5, four ways to train them.

Command:   python -m experiments.tfew --gin_file configs/tfew/small.gin      (goes on where it was stopped)
Time:      15 minutes on one core; learning rates (configs/tfew/rates.gin) 8 more.
Expected:  experiments/RESULTS.md: zero-shot near chance; (IA)^3, full fine-tuning and FISH 67 %, LoRA 64 %.

A small T5 learns Python's docstrings (spans cut out), then a mixture of tasks with templates; (IA)^3 vectors
are pre-trained on that mixture. Few shots of each held-out task then train a patch; accuracy is that of rank
classification on words and texts that no few-shot example has. The form of the tables is that of
arXiv 2205.05638; the tasks are not, so only comparisons inside a table mean anything.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np

from experiments import tfew_report, tfew_tasks
from experiments.gin_cli import main
from fishjax import checkpoint, contribute, data, fisher, masks, models, patches, train, tree
from fishjax.progress import track
from fishjax.types import Batch, Params, Patch

TEMPLATES = Path("configs/tfew/tasks")


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to learn from few shots."""

    name: str
    kind: str  # "ia3", "pretrained" (the (IA)^3 vectors of the mixture), "lora", "fish" or "full"
    learning_rate: float
    unlikelihood: bool = True
    length_normalised: bool = True
    size: float = 0.0  # LoRA's rank, FISH's density


def grid(rates: Mapping[str, Sequence[float]], sizes: Mapping[str, float]) -> list[Method]:
    """Return a method for each kind and learning rate.

    Args:
      rates: by kind. sizes: of kinds that have one.
    """
    return [Method(f"{k} {r:g}", k, r, size=sizes.get(k, 0.0)) for k, some in rates.items() for r in some]


def run(
    *,
    out: str,
    methods: Sequence[Method],
    seeds: Sequence[int],
    width: int,
    layers: int,
    vocabulary: int,
    text_steps: int,
    mixture_steps: int,
    pretrain_steps: int,
    steps: int,
    shots: int = 64,
    batch_size: int = 8,
    rows: int = 4000,
    tests: int = 150,
    base_learning_rate: float = 4e-2,
    pretrain_learning_rate: float = 3e-3,
    split: str = "test",
) -> dict[str, Any]:
    """Train what is not in `out` yet and write `results.json`, `report.md` and plots to it.

    Args:
      methods: what is compared; a row of a table each.
      seeds: of the few shots, their order and the start of a patch.
      text_steps, mixture_steps, pretrain_steps, steps: of docstrings, the mixture, (IA)^3 on the mixture and
        few shots.
      rows: of each task of the mixture. tests: rows that each held-out task is scored on.
      split: `"test"`, or `"validation"`, on which learning rates were chosen.
    """
    folder = _opened(Path(out))
    world = tfew_tasks.read_world()
    names = [*tfew_tasks.MIXTURE, *tfew_tasks.HELD_OUT]
    templates = {name: data.load_templates(TEMPLATES / f"{name}.yaml") for name in names}
    tokenizer = tfew_tasks.make_tokenizer(world, templates, vocabulary)
    sizes = {"d_model": width, "d_kv": width // 4, "num_heads": 4, "d_ff": 2 * width, "num_layers": layers}
    model = models.build({**tfew_tasks.MODEL, "vocab_size": vocabulary, **sizes})
    encode = lambda questions: data.encode_choices(questions, tokenizer, model)

    def asked(makers: dict, world: tfew_tasks.World, count: int, seed: int) -> Batch:
        made = {n: tfew_tasks.rows_of(maker, world, count, seed=seed) for n, maker in makers.items()}
        return data.mix(
            [encode(data.render_all(templates[n], r, seed=seed)) for n, r in made.items()], seed=seed
        )

    def fit(what: str, params: Params, patch: Patch, rows: Batch, rule: Any, steps: int) -> Patch:
        state, _ = train.fit(
            train.init(patch, rule),
            contribute.make_step(model, rule, loss=train.choice_lm_loss),
            params,
            data.batches(tfew_tasks.answers(rows), 64, seed=0, epochs=None),
            steps=steps,
            folder=folder / f"{what}.state",
            description=f"training {what}",
        )
        return train.patch_of(state)

    # The base: all of it is trained, on texts, then on the mixture.
    if not (folder / "base").exists():
        params = started(model)
        texts = encode(tfew_tasks.denoising(world, 64 * text_steps, seed=0))
        mixture = asked(tfew_tasks.MIXTURE, world, rows, 1)
        for what, part, count in (("text", texts, text_steps), ("mixture", mixture, mixture_steps)):
            rule = train.adafactor(base_learning_rate, count)
            params = patches.apply(params, fit(what, params, patches.init_dense(params), part, rule, count))
        models.save(folder / "base", model, params)
    _, base = models.load(folder / "base")
    if not (folder / "pretrained.safetensors").exists():
        mixture = asked(tfew_tasks.MIXTURE, world, rows, 2)
        rule = train.adafactor(pretrain_learning_rate, pretrain_steps)
        start = patches.init_ia3(base, targets="paper")
        tuned = fit("pretrained", base, start, mixture, rule, pretrain_steps)
        checkpoint.save_patch(folder / "pretrained.safetensors", tuned, base=base)
    pretrained = jax.tree.map(jax.numpy.asarray, checkpoint.load_patch(folder / "pretrained.safetensors")[0])

    few, held = tfew_tasks.parts(world, split=split, seed=0)
    tasks = tfew_tasks.prepared(few, held, templates, encode, shots=max(4 * shots, 256), tests=tests)
    classify = jax.jit(train.rank_classify(model))

    def accuracies(params: Params, tests: Sequence[Batch]) -> list[float]:
        return [float((np.asarray(classify(params, t)) == t["answer"]).mean()) for t in tests]

    def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a file holds, making it first where there is none."""
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".partial")
            part.write_text(json.dumps(make()))
            part.replace(file)
        return json.loads(file.read_text())

    mixed = asked(tfew_tasks.MIXTURE, held, tests, 3)
    known = [
        {n: x[i * tests : (i + 1) * tests] for n, x in mixed.items()} for i in range(len(tfew_tasks.MIXTURE))
    ]
    scores = lambda: dict(zip(tfew_tasks.MIXTURE, accuracies(base, known)))
    results: dict[str, Any] = {"mixture": once(folder / "cells" / "mixture.json", scores), "methods": {}}
    zero = lambda: {name: accuracies(base, task.tests) for name, task in tasks.items()}
    results["zero_shot"] = once(folder / "cells" / "zero_shot.json", zero)
    results["chance"] = {n: float((1 / t.tests[0]["choice_mask"].sum(1)).mean()) for n, t in tasks.items()}

    one = {n: x[:1] for n, x in tasks["long"].tests[0].items()}
    results["inference_flops"] = _flops(train.rank_classify(model), base, one)
    cells = [(m, n, s) for m in methods for n in tasks for s in seeds]
    prepared_methods = {m.name: Learner(m, model, base, pretrained, steps) for m in methods}
    for method, name, seed in track(cells, description="few shots"):
        learner, task, many = prepared_methods[method.name], tasks[name], len(templates[name])

        def learn(
            learner=learner, task=task, many=many, seed=seed, method=method, name=name
        ) -> dict[str, Any]:
            start = time.monotonic()
            kept = data.few_shot(range(data.examples(task.shots) // many), shots, seed=seed)
            some = {
                n: x.reshape(-1, many, *x.shape[1:])[kept].reshape(-1, *x.shape[1:])
                for n, x in task.shots.items()
            }
            patch = learner.learn(some, batch_size, seed)
            file = folder / "patches" / f"{_plain(method.name)}.safetensors"
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                checkpoint.save_patch(file, patch, base=base)
            return {
                "accuracy": accuracies(patches.apply(base, patch), task.tests),
                "parameters": patches.num_parameters(patch),
                "training_flops": learner.flops(some, patch, batch_size),
                "bytes": file.stat().st_size,
                "seconds": time.monotonic() - start,
            }

        made = once(folder / "cells" / _plain(method.name) / f"{name}_{seed}.json", learn)
        results["methods"].setdefault(method.name, {}).setdefault(name, []).append(made)
    results["model_parameters"] = sum(x.size for x in jax.tree.leaves(base))
    results["settings"] = {
        "seeds": list(seeds),
        "shots": shots,
        "steps": steps,
        "split": split,
        "tests": tests,
    }
    tfew_report.write(results, folder)
    return results


class Learner:
    """A method's program: compiled once for all tasks and seeds, since its shapes are the same."""

    def __init__(self, method: Method, model: models.Model, base: Params, pretrained: Patch, steps: int):
        terms = {"unlikelihood": method.unlikelihood, "length_normalised": method.length_normalised}
        loss = functools.partial(train.tfew_loss, **terms)
        self.method, self.base, self.pretrained, self.steps = method, base, pretrained, steps
        self.rule = train.adafactor(method.learning_rate, steps)
        self.step = contribute.make_step(model, self.rule, loss=loss)
        self.estimator = fisher.empirical(loss(model))
        self.counted: float | None = None

    def start(self, shots: Batch, seed: int) -> Patch:
        """Return the patch before training."""
        if self.method.kind == "pretrained":
            return self.pretrained
        if self.method.kind == "ia3":
            return patches.init_ia3(self.base, targets="paper")
        if self.method.kind == "lora":
            key = jax.random.key(seed)
            return patches.init_lora(key, self.base, rank=int(self.method.size), targets="paper")
        if self.method.kind == "fish":
            scores = fisher.estimate(self.estimator, self.base, data.batches(shots, 32))
            # As many of each leaf whatever the task, so that the step is compiled once.
            mask = masks.topk(scores, density=self.method.size, scope="leaf", minimum=1)
            return patches.init_sparse(self.base, mask)
        if self.method.kind == "full":
            return patches.init_dense(self.base)
        raise SystemExit(f"`kind` must be ia3, pretrained, lora, fish or full; got `{self.method.kind}`")

    def learn(self, shots: Batch, batch_size: int, seed: int) -> Patch:
        """Return the patch after training."""
        state, _ = train.fit(
            train.init(self.start(shots, seed), self.rule),
            self.step,
            self.base,
            data.batches(shots, batch_size, seed=seed, epochs=None),
            steps=self.steps,
            description=self.method.name,
        )
        return train.patch_of(state)

    def flops(self, shots: Batch, patch: Patch, batch_size: int) -> float:
        """Return the floating-point operations of the training, as XLA counts those of a step."""
        if self.counted is None:
            batch = {n: x[:batch_size] for n, x in shots.items()}
            self.counted = self.steps * _flops(self.step, train.init(patch, self.rule), self.base, batch)
        return self.counted


def started(model: models.Model) -> Params:
    """Return parameters drawn as T5 draws them, by fan-in: with deviations of 0.02 the base learns slowly."""

    def scaled(name: str, x: Any) -> Any:
        if x.ndim < 2 or "shared" in name or "relative" in name:
            return x
        deviation = x.shape[1] ** -0.5 * (model.config["d_kv"] ** -0.5 if ".q." in name else 1.0)
        return x * (deviation / x.std())

    return tree.map_named(scaled, jax.jit(model.init)(jax.random.key(0)))


def _opened(folder: Path) -> Path:
    """Make the folder, or take that of a run of the same settings."""
    settings = "\n".join(line for line in gin.config_str().splitlines() if not line.startswith("OUT"))
    file = folder / "config.gin"
    if file.exists() and file.read_text() != settings:
        raise SystemExit(f"`{folder}` holds a run of other settings; remove it or set another OUT")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(settings)
    return folder


def _flops(fn: Callable, *args: Any) -> float:
    return float(jax.jit(fn).lower(*args).cost_analysis()["flops"])


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


if __name__ == "__main__":
    main("tfew.run", (__doc__ or "").splitlines()[0])
