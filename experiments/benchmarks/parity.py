"""How far fishjax is from transformers and peft, on the tiny random checkpoints of the tests.

    python -m experiments.benchmarks.parity --peer-python PYTHON

The first table compares with the logits and greedy continuations that transformers gave when the fixtures
were made. For the second each adapter of peft's is loaded and saved again by fishjax, and the copy is loaded
by peft, in PYTHON, where torch, transformers and peft are installed. Tokens that are padding are left out.
The exit code is 1 where a difference is above 1e-4 or a continuation another.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "models"
LIMIT = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peer-python", metavar="PYTHON", help="of peft; without it there is no second table"
    )
    args = parser.parse_args()
    good = _models()
    if args.peer_python:
        good &= _adapters(args.peer_python)
    return 0 if good else 1


def _models() -> bool:
    """Print the table of models; say whether all are within the limit."""
    import jax

    good = True
    print("| model | largest difference of logits | largest logit | greedy continuation |\n|---|---|---|---|")
    for case in sorted(p.parent.name for p in FIXTURES.glob("*/model.safetensors")):
        model, params, batch, expected = _load(case)
        real = _real(batch, expected["logits"])
        wanted = expected["logits"][real]
        far = np.abs(np.asarray(jax.jit(model.apply)(params, batch))[real] - wanted).max()
        same = None
        if "greedy" in expected:
            new = model.generate(params, batch, max_new_tokens=expected["greedy"].shape[1])
            same = bool((np.asarray(new) == expected["greedy"]).all())
        good &= bool(far <= LIMIT) and same is not False
        said = {None: "", True: "equal", False: "**another**"}[same]
        print(f"| `{case}` | {far:.1e} | {np.abs(wanted).max():.1f} | {said} |", flush=True)
    return good


def _adapters(python: str) -> bool:
    """Print the table of adapters; say whether all are within the limit."""
    import jax

    from fishjax import checkpoint, patches

    jobs: list[str] = []
    names = sorted(
        str(p.parent.relative_to(FIXTURES)) for p in FIXTURES.glob("*/adapters/*/adapter_config.json")
    )
    with tempfile.TemporaryDirectory() as top:
        for i, name in enumerate(names):
            case = name.partition("/")[0]
            model, params, batch, _ = _load(case)
            patch = checkpoint.load_peft(FIXTURES / name, model, params)
            checkpoint.save_peft(Path(top, str(i)), patch, model, params=params)
            logits = np.array(jax.jit(model.apply)(patches.apply(params, patch), batch))
            with checkpoint.open_params(FIXTURES / name / "expected.safetensors") as theirs:
                padding = ~_real(batch, logits)
                logits[padding] = theirs["logits"][padding]  # so that nothing differs there
            np.save(Path(top, f"{i}.npy"), logits)
            jobs += [case, str(Path(top, str(i))), str(Path(top, f"{i}.npy"))]
        done = subprocess.run(
            [python, str(FIXTURES / "make_peft.py"), *jobs],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    lines = [line for line in done.stdout.splitlines() if " largest difference " in line]
    far = [float(line.rsplit(maxsplit=1)[1]) for line in lines]
    print(f"\n{done.stdout.splitlines()[-1]}\n\n| adapter | largest difference of logits |\n|---|---|")
    for name, x in zip(names, far, strict=True):
        print(f"| `{name.replace('/adapters/', ' ')}` | {x:.1e} |")
    return all(x <= LIMIT for x in far)


def _load(case: str) -> tuple[Any, Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a model, its parameters, the batch, and what transformers made of it."""
    from fishjax import checkpoint, models

    model, params = models.load(FIXTURES / case)
    with checkpoint.open_params(FIXTURES / case / "expected.safetensors") as file:
        expected = {name: np.array(file[name]) for name in file}
    batch = {name: x for name, x in expected.items() if name not in ("logits", "greedy")}
    return model, params, batch, expected


def _real(batch: dict[str, np.ndarray], logits: np.ndarray) -> np.ndarray:
    """Return where logits are defined: bool `[B]`, or `[B, T]` without padding."""
    if logits.ndim == 2:
        return np.ones(logits.shape[:1], bool)
    return batch["labels"] >= 0 if "labels" in batch else batch["attention_mask"] > 0


if __name__ == "__main__":
    sys.exit(main())
