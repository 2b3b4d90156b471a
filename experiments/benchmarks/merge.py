"""How fast and how small merging is, beside the copy limit of the machine and beside mergekit.

    python -m experiments.benchmarks.merge --mergekit ENV/bin/mergekit-yaml    # two of 1.3 GB, and the peer
    python -m experiments.benchmarks.merge --sparse 20 --folder F --runs 1     # two of 20 GB, for memory

The first needs 9 GB of disk and takes 5 minutes, the second writes 20 GB a job.

Every job runs in a process of its own, several times after one warming run, files in the page cache;
the copy limit reads all inputs and writes one output with two threads and computes nothing. Both wait for
the disk at the end; an "early" copy tells the disk to begin with every block, as merges do. Time is wall
clock inside the process without the start of the interpreter (mergekit's is its whole command, which waits
for no disk), then processor time, which a busy machine changes less; memory is what the process's largest
resident size grew by from after the imports. Sparse files hold random numbers in one entry of 256 and
holes else; reading holes is quicker than reading a disk, so they show memory, not speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

LAYER = {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024), "o": (1024, 1024), "gate": (2816, 1024)}
LAYER |= {"up": (2816, 1024), "down": (1024, 2816), "norm": (1024,)}
PEER = {  # mergekit's own names for a llama, so that it can read the files
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm": "input_layernorm",
}


def shapes(entries: float) -> dict[str, tuple[int, ...]]:
    """Return a llama's tensors with about so many entries in all."""
    words = 32000 if entries > 1e8 else 1000
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, 1024),
        "model.norm.weight": (1024,),
    }
    found["lm_head.weight"] = (words, 1024)
    per_layer = sum(int(np.prod(s)) for s in LAYER.values()) + 1024
    for i in range(max(1, round((entries - 2 * words * 1024) / per_layer))):
        found |= {f"model.layers.{i}.{PEER[n]}.weight": s for n, s in LAYER.items()}
        found[f"model.layers.{i}.post_attention_layernorm.weight"] = (1024,)
    return found


def make(folder: Path, entries: float) -> None:
    """Write a base, two models near it, their Fishers, and all models in bfloat16."""
    from fishjax.checkpoint._dtypes import Spec
    from fishjax.checkpoint._params import write_folder

    wanted = shapes(entries)

    def draw(seed: int, name: str) -> np.ndarray:
        key = [seed, *name.encode()]
        return np.random.default_rng(key).standard_normal(wanted[name], dtype=np.float32)

    def write(name: str, dtype: type, values: Callable[[str], np.ndarray]) -> None:
        (folder / name).mkdir(parents=True)
        specs = {n: Spec(np.dtype(dtype), s) for n, s in wanted.items()}
        write_folder(folder / name, specs, lambda n: values(n).astype(dtype))
        (folder / name / "config.json").write_text(json.dumps(config(wanted, dtype)))

    for dtype, tail in ((np.float32, ""), (ml_dtypes.bfloat16, "_bf16")):
        write(f"base{tail}", dtype, lambda n: 0.02 * draw(0, n))
        for i in (1, 2):
            write(f"m{i}{tail}", dtype, lambda n, i=i: 0.02 * draw(0, n) + 0.002 * draw(i, n))
    for i in (1, 2):
        write(f"f{i}", np.float32, lambda n, i=i: 1e-4 * draw(10 + i, n) ** 2)


def make_sparse(folder: Path, entries: float) -> None:
    """Write a base and two models as files that are mostly holes: large to read, small on the disk."""
    from fishjax.checkpoint._dtypes import Spec
    from fishjax.merge._output import layout

    specs = {
        f"layer.{i}.weight": Spec(np.dtype(np.float32), (1 << 14, 1 << 14)) for i in range(int(entries) >> 28)
    }
    header, offsets = layout(specs)
    for seed, name in enumerate(("base", "m1", "m2")):
        (folder / name).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        with open(folder / name / "model.safetensors", "wb") as f:
            f.write(header)
            f.truncate(len(header) + sum(4 << 28 for _ in specs))
            for start in offsets.values():
                for offset in range(0, 4 << 28, 1 << 20):
                    f.seek(len(header) + start + offset + 4096 * int(rng.integers(1, 255)))
                    f.write(rng.standard_normal(1 << 10, dtype=np.float32).tobytes())


def config(wanted: Iterable[str], dtype: type) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "vocab_size": 32000,
        "num_hidden_layers": sum(n.endswith("q_proj.weight") for n in wanted),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "torch_dtype": np.dtype(dtype).name,
        "tie_word_embeddings": False,
    }


def copy(inputs: list[Path], out: Path, early: bool = False) -> None:
    """Read all inputs and write as much as one of them, and compute nothing."""
    for file in sorted(p.name for p in inputs[0].glob("*.safetensors")):
        fds = [os.open(path / file, os.O_RDONLY) for path in inputs]
        out.mkdir(exist_ok=True)
        target = os.open(out / file, os.O_RDWR | os.O_CREAT)
        size = os.fstat(fds[0]).st_size
        os.ftruncate(target, size)
        local = threading.local()

        def step(offset: int, fds=fds, target=target, local=local) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = bytearray(1 << 20)
            for fd in fds:
                count = os.preadv(fd, [local.buffer], offset)
            os.pwrite(target, memoryview(local.buffer)[:count], offset)
            if early:
                os.posix_fadvise(target, offset, count, os.POSIX_FADV_DONTNEED)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(step, range(0, size, 1 << 20)))
        os.fsync(target)
        for fd in [*fds, target]:
            os.close(fd)


def jobs(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Return what is measured: a name and what it does with an output's path."""
    from fishjax import merge

    models, small = ([folder / f"m{i}{t}" for i in (1, 2)] for t in ("", "_bf16"))
    fishers = [folder / "f1", folder / "f2"]
    plain = {"digests": False}
    return {
        "copy": lambda out: copy(models, out),
        "copy early": lambda out: copy(models, out, early=True),
        "average": lambda out: merge.files("average", models, out, **plain),
        "average, with digests": lambda out: merge.files("average", models, out),
        "copy bf16": lambda out: copy(small, out),
        "copy bf16 early": lambda out: copy(small, out, early=True),
        "average bf16": lambda out: merge.files("average", small, out, **plain),
        "copy 4": lambda out: copy([*models, *fishers], out),
        "copy 4 early": lambda out: copy([*models, *fishers], out, early=True),
        "fisher": lambda out: merge.files("fisher", models, out, fishers=fishers, **plain),
        "slerp": lambda out: merge.files("slerp", models, out, t=0.3, **plain),
        "ties": lambda out: merge.files(
            "ties", models, out, base=folder / "base", density=0.2, scope="tensor", **plain
        ),
        "ties global": lambda out: merge.files(
            "ties", models, out, base=folder / "base", density=0.2, **plain
        ),
    }


RECIPES = {
    "average": "{merge_method: linear, parameters: {weight: 1}, models: [{model: m1}, {model: m2}]}",
    "ties": "{merge_method: ties, base_model: base, parameters: {density: 0.2, weight: 1}, "
    "models: [{model: m1}, {model: m2}]}",
}


def measure(name: str, folder: Path, runs: int, warm: int) -> None:
    """Run one job several times and print its times and memory; this process does nothing else."""
    job = jobs(folder)[name]
    before, seconds, cpu = _peak(), [], []
    for _ in range(runs + warm):
        with tempfile.TemporaryDirectory(dir=folder) as top:
            start, used = time.perf_counter(), time.process_time()
            job(Path(top, "out"))
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
    print(json.dumps({"seconds": seconds[warm:], "cpu": cpu[warm:], "memory": _peak() - before}))


def _peak() -> int:
    # Not ru_maxrss: a process inherits that of its parent, which may have made the files.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def peer(program: str, name: str, folder: Path) -> dict:
    """Run mergekit's command once on the same files."""
    with tempfile.TemporaryDirectory(dir=folder) as top:
        recipe = Path(top, "recipe.yaml")
        recipe.write_text(RECIPES[name])
        start = time.perf_counter()
        command = [program, str(recipe), f"{top}/out", "--no-copy-tokenizer", "--no-write-model-card"]
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"mergekit failed on {name}")
        return {"seconds": [time.perf_counter() - start], "memory": usage.ru_maxrss << 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=float, default=3.22e8, help="of each model")
    parser.add_argument("--folder", type=Path, help="where the files are, or are to be; kept if given")
    parser.add_argument(
        "--sparse", type=float, metavar="GB", help="models of this size, of holes; removed after"
    )
    parser.add_argument("--only", nargs="+", help="some of the jobs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", help="its `mergekit-yaml`")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.folder, args.runs, 0 if args.sparse else 1)
        return
    if args.sparse and args.mergekit:
        parser.error("--sparse is for memory; measure --mergekit on whole files")
    with tempfile.TemporaryDirectory(dir=args.folder if args.sparse else None) as top:
        folder = Path(top) if args.sparse else args.folder or Path(top)
        if args.sparse:
            make_sparse(folder, args.sparse * 1e9 / 4)
        elif not (folder / "f2").exists():
            make(folder, args.entries)
        print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
        table: dict[str, dict] = {}
        for name in args.only or (("average", "ties global") if args.sparse else jobs(folder)):
            command = [sys.executable, "-m", "experiments.benchmarks.merge", "--measure", name]
            command += ["--folder", str(folder), "--runs", str(args.runs)]
            command += ["--sparse", str(args.sparse)] if args.sparse else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            table[name] = json.loads(done.stdout)
            _show(name, table)
        for name in RECIPES if args.mergekit else ():
            table[f"mergekit {name}"] = peer(args.mergekit, name, folder)
            _show(f"mergekit {name}", table)


def _show(name: str, table: dict[str, dict]) -> None:
    seconds = sorted(table[name]["seconds"])
    limits = {"average": "copy", "average bf16": "copy bf16", "fisher": "copy 4"}
    text = f"{name:24} {seconds[len(seconds) // 2]:7.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"
    text += f"  cpu {min(table[name]['cpu']):6.2f} s" if "cpu" in table[name] else ""
    text += f"  {table[name]['memory'] / 1e6:7.0f} MB"
    if limits.get(name) in table:
        limit, early = table[limits[name]], table.get(f"{limits[name]} early")
        text += f"  {seconds[0] / min(limit['seconds']):.2f} x the copy limit (best by best)"
        text += f", {seconds[0] / min(early['seconds']):.2f} x the early one" if early else ""
        text += f", {min(table[name]['cpu']) / min(limit['cpu']):.2f} x its processor time"
    if name.startswith("mergekit ") and name.removeprefix("mergekit ") in table:
        ours = table[name.removeprefix("mergekit ")]["seconds"]
        text += f"  {seconds[0] / sorted(ours)[len(ours) // 2]:.0f} x our time"
    print(text, flush=True)


if __name__ == "__main__":
    main()
