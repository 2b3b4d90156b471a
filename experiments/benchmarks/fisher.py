"""The diagonal Fisher beside the plain gradient, other ways in JAX, and PyTorch's ways.

    python -m experiments.benchmarks.fisher --shape minilm --examples 64
    python -m experiments.benchmarks.fisher --shape bert --examples 16 --peer-python ENV/bin/python
    python -m experiments.benchmarks.fisher --shape mlp --examples 512 --only plain:64 one_pass:64

Each method runs in a process of its own; the methods take turns, round after round, so that whatever
else the machine does falls on all of them; the table holds medians. "CPU s" is the processor time of
all threads, which other work on the machine hardly changes. Memory is what the resident set rose by at
most during the call, weights and data being loaded before. "foreign" is the share of the machine that
other processes took in the median round: above 10 % the wall clock means little.
Data are random. `--peer-python` names a Python with torch, opacus and backpack (see `fisher_torch.py`).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# layers, width, heads, inner width, vocabulary; a perceptron has layers and width only.
SHAPES: dict[str, dict[str, int]] = {
    "minilm": {"layers": 6, "width": 384, "heads": 12, "inner": 1536, "vocabulary": 30522},
    "bert": {"layers": 12, "width": 768, "heads": 12, "inner": 3072, "vocabulary": 30522},
    "tiny": {"layers": 2, "width": 32, "heads": 2, "inner": 128, "vocabulary": 500},
    "mlp": {"layers": 4, "width": 1024},
}
CLASSES = 3
JAX = ["plain:8", "one_pass:8", "auto:1", "single:1", "vmap:4", "exact2:8", "exact:8", "rate:1"]
TORCH = ["torch_loop:1", "torch_exact:1", "torch_vmap:4", "torch_opacus:4", "torch_rate:1"]


def main() -> None:
    args = _arguments()
    if args.worker:
        serve(*jobs(args, *_split(args.worker)))
        return
    names = args.only or JAX + (TORCH if args.peer_python else [])
    names += ["torch_backpack:64"] if args.peer_python and args.shape == "mlp" and not args.only else []
    workers = {name: start(args, name) for name in names}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            rounds[name].append(ask(worker))
    for worker in workers.values():
        worker.communicate("\n")
    report(args, rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="METHOD:MICRO_BATCH")
    parser.add_argument("--peer-python", metavar="PYTHON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _split(name: str) -> tuple[str, int]:
    method, size = name.split(":")
    return method, int(size)


def start(args: argparse.Namespace, name: str) -> subprocess.Popen:
    """Start the process of a method; it compiles and warms itself."""
    options = [f"--{k}={getattr(args, k)}" for k in ("shape", "examples", "tokens", "dtype")]
    script = [sys.executable, "-m", "experiments.benchmarks.fisher"]
    if name.startswith("torch"):
        script = [args.peer_python, "-m", "experiments.benchmarks.fisher_torch"]
    worker = subprocess.Popen(
        [*script, *options, f"--worker={name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ask(worker)  # the warming run
    return worker


def ask(worker: subprocess.Popen) -> dict[str, float]:
    """Let a method run once; return what it measured, and how busy others kept the machine."""
    assert worker.stdin and worker.stdout
    before = _machine()
    worker.stdin.write("run\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker died: {' '.join(map(str, worker.args))}")
    found = json.loads(line)
    busy, total = (b - a for a, b in zip(before, _machine(), strict=True))
    found["foreign"] = max(0.0, busy - found["cpu"] * os.sysconf("SC_CLK_TCK")) / max(total, 1)
    return found


def _machine() -> tuple[int, int]:
    """Busy and total time of all processors, in clock ticks."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def serve(job: Callable[[], Any], compile_seconds: float = 0.0) -> None:
    """Run a job whenever a line comes in and say what it took, until an empty one."""
    for line in sys.stdin:
        if not line.strip():
            return
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
        resident = _status("VmRSS")
        cpu, start = time.process_time(), time.perf_counter()
        extra = job()
        found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        found |= {"megabytes": (_status("VmHWM") - resident) / 1024, "compile": compile_seconds}
        print(json.dumps(found | ({"rate": extra} if isinstance(extra, float) else {})), flush=True)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field))


def report(args: argparse.Namespace, rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print a Markdown table; ratios are of the medians of this run."""
    median = {n: {k: statistics.median(r[k] for r in found) for k in found[0]} for n, found in rounds.items()}
    plain = next((n for n in median if n.startswith("plain")), None)
    loop = next((n for n in median if n.startswith("torch_loop")), None)
    what = f"{args.shape}, {args.examples} examples, {args.tokens} tokens, {args.dtype}"
    print(f"\n{what}; medians of {args.rounds} interleaved rounds, {os.cpu_count()} cores\n")
    print(
        "| method : micro-batch | s | CPU s | x plain | x plain (CPU) | x torch loop | peak +MB "
        "| compile s | foreign |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, m in median.items():
        if "rate" in m:
            print(f"| {name} | {m['rate']:.0f} GFLOP/s | | | | | | | {100 * m['foreign']:.0f} % |")
            continue
        ratio = f"{m['seconds'] / median[plain]['seconds']:.2f}" if plain else ""
        cpu = f"{m['cpu'] / median[plain]['cpu']:.2f}" if plain else ""
        faster = f"{median[loop]['seconds'] / m['seconds']:.2f}" if loop else ""
        print(
            f"| {name} | {m['seconds']:.2f} | {m['cpu']:.2f} | {ratio} | {cpu} | {faster} "
            f"| {m['megabytes']:.0f} | {m['compile']:.1f} | {100 * m['foreign']:.0f} % |"
        )


def jobs(args: argparse.Namespace, method: str, size: int) -> tuple[Callable[[], Any], float]:
    """Return what a JAX method runs, one pass over all examples, and the seconds to compile it."""
    import jax
    import jax.numpy as jnp

    from fishjax import fisher

    if method == "rate":
        return lambda: matrix_rate(jax, jnp), 0.0
    logits = perceptron if args.shape == "mlp" else encoder
    params, batch = random_problem(args)
    params = jax.tree.map(lambda x: jnp.asarray(x, args.dtype), params)
    batch = jax.tree.map(jnp.asarray, batch)
    heads = SHAPES[args.shape].get("heads", 1)

    def loss(params, example):
        return -jax.nn.log_softmax(logits(params, example["x"], heads).astype(jnp.float32))[example["y"]]

    def plain(params, batch):
        def step(total, part):
            gradient = jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, part).sum())(params)
            return jax.tree.map(jnp.add, total, gradient), None

        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), parts)[0]

    two = lambda p, e: logits(p, e["x"], heads)[:2]
    three = lambda p, e: logits(p, e["x"], heads)
    estimators = {
        "one_pass": lambda: fisher.empirical(loss, method="one_pass", chunk_size=size),
        "auto": lambda: fisher.empirical(loss),
        "single": lambda: fisher.empirical(loss, method="reference", chunk_size=1),
        "vmap": lambda: fisher.empirical(loss, method="reference", chunk_size=size),
        "exact2": lambda: fisher.exact(two, method="one_pass", chunk_size=size),
        "exact": lambda: fisher.exact(three, method="one_pass", chunk_size=size),
    }
    if method == "plain":
        run = jax.jit(plain)
    else:
        estimator = estimators[method]()
        run = jax.jit(lambda params, batch: estimator.update(estimator.init(params), params, batch))
    start = time.perf_counter()
    compiled = run.lower(params, batch).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(compiled(params, batch)) and None, seconds


def matrix_rate(jax: Any, jnp: Any, n: int = 3072) -> float:
    """Return the rate of a float32 matrix product, in GFLOP/s."""
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    return 2 * n**3 / (time.perf_counter() - start) / 1e9


def random_problem(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return float32 parameters and a batch, the same for both frameworks' shapes."""
    import numpy as np

    rng, c = np.random.default_rng(0), SHAPES[args.shape]
    d = c["width"]

    def normal(*shape):
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    def dense(n, m):
        return {"w": normal(n, m), "b": normal(m)}

    def norm():
        return {"scale": 1 + normal(d), "bias": normal(d)}

    y = rng.integers(0, CLASSES, args.examples).astype(np.int32)
    if args.shape == "mlp":
        x = rng.standard_normal((args.examples, d), np.float32)
        sizes = [d] * c["layers"] + [CLASSES]
        return {"layers": [dense(n, m) for n, m in itertools.pairwise(sizes)]}, {"x": x, "y": y}

    def layer():
        parts = {n: dense(d, d) for n in ("q", "k", "v", "o")}
        parts |= {"up": dense(d, c["inner"]), "down": dense(c["inner"], d)}
        return parts | {"norm1": norm(), "norm2": norm()}

    params = {
        "token": normal(c["vocabulary"], d),
        "position": normal(512, d),
        "segment": normal(2, d),
        "norm": norm(),
        "layers": [layer() for _ in range(c["layers"])],
        "pool": dense(d, d),
        "head": dense(d, CLASSES),
    }
    x = rng.integers(0, c["vocabulary"], (args.examples, args.tokens)).astype(np.int32)
    return params, {"x": x, "y": y}


def encoder(params: Any, ids: Any, heads: int) -> Any:
    """The logits of a BERT-shaped classifier for one example, ids `[T]`."""
    import jax
    import jax.numpy as jnp

    def dense(x, w):
        return x @ w["w"] + w["b"]

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-12) * w["scale"] + w["bias"]

    t = ids.shape[0]
    x = norm(params["token"][ids] + params["position"][:t] + params["segment"][0], params["norm"])
    for w in params["layers"]:
        q, k, v = (dense(x, w[n]).reshape(t, heads, -1) for n in ("q", "k", "v"))
        a = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5)
        x = norm(x + dense(jnp.einsum("hts,shk->thk", a, v).reshape(t, -1), w["o"]), w["norm1"])
        x = norm(x + dense(jax.nn.gelu(dense(x, w["up"])), w["down"]), w["norm2"])
    return dense(jnp.tanh(dense(x[0], params["pool"])), params["head"])


def perceptron(params: Any, x: Any, heads: int) -> Any:
    """The logits of a multi-layer perceptron for one example `[d]`."""
    import jax

    for w in params["layers"][:-1]:
        x = jax.nn.relu(x @ w["w"] + w["b"])
    return x @ params["layers"][-1]["w"] + params["layers"][-1]["b"]


if __name__ == "__main__":
    main()
