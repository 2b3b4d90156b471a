"""Accuracy against how many weights are trained: FISH, random, magnitude, BitFit, LoRA, full fine-tuning.

Command:   python -m experiments.fish_density --gin_file configs/fish_digits.gin
           (configs/fish_docstrings.gin: MiniLM; configs/fish_glue.gin: any `glue/*`, needs a network)
Time:      8 minutes on one core for the digits (187 cells), an hour for MiniLM; goes on where it was stopped.
Expected:  experiments/RESULTS.md: masks are as good as full fine-tuning from 0.5 or 2 % on, FISH is last.

Learning rates are chosen on validation data (first seed), accuracies reported on test data.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from experiments import fish_bench, fish_tables
from experiments.fish_bench import Bench
from experiments.fish_problems import Problem
from experiments.gin_cli import main
from fishjax import masks, plot


def run(
    *,
    out: str,
    problem: Problem,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    densities: Sequence[float],
    choices: Mapping[str, Callable[..., Any]],
    mask_rates: Sequence[float],
    bitfit_rates: Sequence[float],
    lora_ranks: Sequence[int],
    lora_rates: Sequence[float],
    full_rates: Sequence[float],
) -> dict[str, Any]:
    """Run all cells; write `results.json`, `report.md` and plots to `out`."""
    start, folder = time.monotonic(), Path(out)
    bench = fish_bench.make(problem, steps=steps, batch_size=batch_size)
    ways: dict[str, tuple[Any, Sequence[float]]] = {}
    for name, choose in choices.items():
        for density in densities:
            bound = functools.partial(_at, choose, density)
            ways[f"{name} {100 * density:g} %"] = (functools.partial(_masked, bench, bound), mask_rates)
    bitfit = lambda bench, seed: masks.bitfit(problem.base(seed), always=problem.always)
    ways["BitFit"] = (functools.partial(_masked, bench, bitfit), bitfit_rates)
    for rank in lora_ranks:
        lora = lambda rate, seed, rank=rank: fish_bench.lora(bench, rate, seed, rank=rank)
        ways[f"LoRA {rank}"] = (lora, lora_rates)
    whole = lambda bench, seed: masks.by_name(problem.base(seed), "")
    ways["full fine-tuning"] = (functools.partial(_masked, bench, whole), full_rates)

    where = {name: fish_bench.share_of(choose(bench, seeds[0], 0.005)) for name, choose in choices.items()}
    for name, choose in choices.items():
        plot.mask_density(choose(bench, seeds[0], 0.005), folder / "plots" / f"{problem.name}_{name}_mask")
    found = {
        "settings": bench.settings,
        "base": bench.accuracy(problem.base(seeds[0]), "test"),
        "ways": fish_bench.study(folder, bench.settings, ways, seeds),
        "where": where,
        "seconds": round(time.monotonic() - start, 1),
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "config.gin").write_text(gin.config_str())
    lines = fish_tables.density(found, list(choices), densities, folder / "plots" / problem.name)
    (folder / "report.md").write_text(lines)
    print(lines)
    return found


def _at(choose: Callable[..., Any], density: float, bench: Bench, seed: int) -> Any:
    return choose(bench, seed, density)


def _masked(bench: Bench, choose: Callable[..., Any], rate: float, seed: int) -> fish_bench.Cell:
    return fish_bench.masked(bench, choose, rate, seed)


if __name__ == "__main__":
    main("fish_density.run", (__doc__ or "").splitlines()[0])
