"""Loading a model folder beside reading its file into memory, both from the page cache.

    python -m experiments.benchmarks.load --layers 16 --rounds 5

A Llama-shaped folder of random float32 weights is written to a temporary folder (about 105 MB a layer). Each
load is timed in a process of its own, after the imports, the two methods taking turns; medians, and how
much the resident set rose at most above the state before the call.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"hidden_size": 1408, "intermediate_size": 4096, "num_attention_heads": 11, "num_key_value_heads": 11}
METHODS = ("read", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory() as top:
        folder = make(Path(top), args.layers)
        size = (folder / "model.safetensors").stat().st_size
        command = [sys.executable, "-m", "experiments.benchmarks.load", "--folder", str(folder), "--worker"]
        found: dict[str, list] = {method: [] for method in METHODS}
        for _ in range(args.rounds):
            for method in METHODS:
                done = subprocess.run([*command, method], check=True, capture_output=True, text=True)
                found[method].append(json.loads(done.stdout))
    print(f"{size / 1e9:.2f} GB, {args.rounds} rounds\n")
    print("| method | s | of read | peak / size |\n|---|---|---|---|")
    seconds = {m: statistics.median(r["seconds"] for r in rounds) for m, rounds in found.items()}
    for method, rounds in found.items():
        peak = statistics.median(r["peak"] for r in rounds) / size
        print(f"| {method} | {seconds[method]:.2f} | {seconds[method] / seconds['read']:.2f} | {peak:.2f} |")


def make(top: Path, layers: int) -> Path:
    """Write the folder."""
    import jax
    import numpy as np

    from fishjax import models

    model = models.build({"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 1000, **SHAPE})
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    models.save(top / "model", model, params)
    return top / "model"


def measure(method: str, folder: Path) -> dict[str, float]:
    """Time one load in this process; its imports and the page cache are warm."""
    import jax

    from fishjax import models

    jax.block_until_ready(jax.numpy.ones(1) + 1)
    before, start = _status("VmRSS"), time.perf_counter()
    if method == "read":
        with open(folder / "model.safetensors", "rb") as file:
            held = file.read()
    else:
        held = jax.block_until_ready(models.load(folder))
    seconds = time.perf_counter() - start
    peak = _status("VmHWM") - before
    del held
    return {"seconds": seconds, "peak": peak}


def _status(field: str) -> int:
    """Return bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which is not here")


if __name__ == "__main__":
    main()
