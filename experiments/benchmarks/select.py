"""Exact top-k of many scores: `masks.indices` beside numpy and torch, and over a mapped file.

    python -m experiments.benchmarks.select --peer PYTHON --rounds 5       # 3 minutes, 2 GB
    python -m experiments.benchmarks.select --entries 3_000_000_000 --mapped --rounds 3   # 3 minutes, 12 GB

`--peer` names a python that has torch. The scores, fourth powers of normal numbers, are written once to a
temporary file that every process reads; each method runs in a process of its own, the methods taking
turns. Medians, of the first call and of the better of two more; the peak is how far the resident set rose
above the state with the scores loaded. With `--mapped` the scores stay in the file (page cache hot), and
heap is the peak without the file's pages.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = ("read", "indices", "partition")
TORCH = """
import json, sys, time, numpy as np, torch
scores = torch.from_numpy(np.fromfile(sys.argv[1], np.float32))
keep = int(sys.argv[2])
seconds = []
for _ in range(3):
    start = time.perf_counter()
    found = torch.topk(scores, keep, sorted=False)
    seconds.append(time.perf_counter() - start)
again = min(seconds[1:])
print(json.dumps({"seconds": seconds[0], "again": again, "threshold": float(found.values.min())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=110_000_000)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mapped", action="store_true", help="leave the scores in the file")
    parser.add_argument("--peer", help="a python with torch")
    parser.add_argument("--folder", help="where the scores are written")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep = round(args.density * args.entries)
    if args.worker:
        print(json.dumps(measure(args.worker[0], Path(args.worker[1]), keep, args.mapped)))
        return
    methods = [m for m in HERE if not (args.mapped and m == "partition")]
    with tempfile.TemporaryDirectory(dir=args.folder) as top:
        file = Path(top, "scores")
        write(file, args.entries)
        own = [sys.executable, "-m", "experiments.benchmarks.select", "--entries", str(args.entries)]
        own += ["--density", str(args.density), *(["--mapped"] if args.mapped else [])]
        commands = {m: [*own, "--worker", m, str(file)] for m in methods}
        if args.peer:
            commands["torch.topk"] = [args.peer, "-c", TORCH, str(file), str(keep)]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    thresholds = {r["threshold"] for name, rs in found.items() if name != "read" for r in rs}
    assert len(thresholds) == 1, thresholds
    median, again = (
        {n: statistics.median(r[which] for r in rs) for n, rs in found.items()}
        for which in ("seconds", "again")
    )
    print(f"{args.entries:,} scores, {keep:,} kept, {args.rounds} rounds, {os.cpu_count()} cores\n")
    print(
        "| method | first call s | / `indices` | of read | again s | / `indices` | of read "
        "| peak +MB | heap +MB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name, rs in found.items():
        peak, heap = (max(r.get(k, 0) for r in rs) / 1e6 for k in ("peak", "heap"))
        print(
            f"| {name} "
            + "".join(
                f"| {m[name]:.3f} | {m[name] / m['indices']:.1f} | {m[name] / m['read']:.2f} "
                for m in (median, again)
            )
            + f"| {peak:.0f} | {heap:.0f} |"
        )


def write(file: Path, entries: int) -> None:
    """Write fourth powers of normal numbers: as heavy-tailed as a Fisher."""
    rng = np.random.default_rng(0)
    with open(file, "wb") as out:
        for start in range(0, entries, 1 << 24):
            x = rng.standard_normal(min(1 << 24, entries - start), np.float32)
            np.power(x, 4, out=x)
            out.write(x)


def measure(method: str, file: Path, keep: int, mapped: bool) -> dict[str, float]:
    """Time one selection in this process."""
    from fishjax import masks

    scores = np.memmap(file, np.float32, "r") if mapped else np.fromfile(file, np.float32)
    masks.indices({"w": np.arange(10.0)}, density=0.5)  # whatever is loaded at the first call
    if method == "read":  # into one block, so that it is the reading that is timed
        block = 1 << 20
        run: Callable[[], Any] = lambda: max(
            scores[i : i + block].max() for i in range(0, scores.size, block)
        )
    elif method == "partition":
        run = lambda: np.partition(scores, scores.size - keep)[scores.size - keep]
    else:
        run = lambda: masks.indices({"w": scores}, density=keep / scores.size)["w"]
    before, heap = _status("VmRSS"), _status("RssAnon")
    done, most = threading.Event(), [heap]
    watch = threading.Thread(target=_watch, args=(done, most))
    if mapped:
        watch.start()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    done.set()
    threshold = float(scores[result].min() if method == "indices" else result)
    found = {"seconds": seconds[0], "again": min(seconds[1:]), "threshold": threshold}
    return found | {"peak": _status("VmHWM") - before, "heap": most[0] - heap}


def _watch(done: threading.Event, most: list[int]) -> None:
    """Keep the largest anonymous memory seen, every 20 ms."""
    while not done.wait(0.02):
        most[0] = max(most[0], _status("RssAnon"))


def _status(field: str) -> int:
    """Return bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which is not here")


if __name__ == "__main__":
    main()
