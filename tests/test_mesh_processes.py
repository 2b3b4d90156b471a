"""Two processes of two CPU devices each are one machine of four; a missing one is an error, not a hang."""

import concurrent.futures
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fishjax import checkpoint, mesh, models
from fishjax.errors import FishjaxError, UsageError

HERE = pathlib.Path(__file__).parent
LIMIT = 150  # seconds, on a busy machine; alone it takes about 10


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*args, **more):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")} | more
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def last_lines(processes):
    """What each printed last; whatever happens, none of them is left running."""
    end, found = time.monotonic() + LIMIT, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1, end - time.monotonic()))
            assert process.returncode == 0, err[-3000:]
            found.append(out.splitlines()[-1])
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # SIGTERM is swallowed
                process.wait()
    return found


def test_two_processes_do_what_one_does(tmp_path):
    port = free_port()
    own = [(port, 0, tmp_path, "two"), (port, 1, tmp_path, "two"), (0, 0, tmp_path, "alone")]
    processes = [start(HERE / "mesh_process.py", *arguments) for arguments in own]
    first, second, alone = map(json.loads, last_lines(processes))
    assert "`w` has NaN" in first.pop("refused") and "process 0 of several" in second.pop("refused")
    assert "`w` has NaN" in alone.pop("refused")
    assert first == second and (first["devices"], first["here"], first["spec"]) == (4, 2, "fsdp")
    assert alone["here"] == 4
    for name in ("mask", "chosen", "tuned", "straight", "fisher", "merged"):
        same = lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-6)
        jax.tree.map(same, first[name], alone[name], is_leaf=lambda x: isinstance(x, list))
    assert first["tuned"] == first["straight"]  # stopped and gone on, or not stopped
    assert (tmp_path / "two").is_dir()


def test_fishjax_train_by_two_processes_writes_one_patch(tmp_path):
    """Two processes of two devices, against one process of four: remat, scan, FSDP, the first one writes."""
    pytest.importorskip("gin")
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 2, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    model = models.build({"model_type": "t5", **sizes})
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32)
    models.save(tmp_path / "model", model, jax.tree.map(draw, shapes))
    rows = [{n: rng.integers(2, 16, 5).tolist() for n in ("input_ids", "labels")} for _ in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def train(out, devices, *more):
        names = {"MODEL": tmp_path / "model", "DATA": tmp_path / "rows.jsonl", "OUT": tmp_path / out}
        lines = [*(f'{n} = "{p}"' for n, p in names.items()), "STEPS = 4", 'AXES = {"fsdp": 4}']
        lines += ["BATCH_SIZE = 8", "contribute.run.learning_rate = 0.05"]
        words = [word for line in lines for word in ("--gin_bindings", line)]
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        gin_file = HERE.parent / "configs" / "t0_3b_ia3.gin"
        return start("-m", "fishjax", "train", "--gin_file", gin_file, *words, *more, **flags)

    port = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    digests = last_lines([train("two", 2, *port, 0), train("two", 2, *port, 1), train("alone", 4)])
    assert digests[0] == digests[1] == checkpoint.read_patch(tmp_path / "two").digest
    two, alone = (checkpoint.load_patch(tmp_path / out)[0] for out in ("two", "alone"))
    assert two.keys() == alone.keys() and not (tmp_path / "two.partial").exists()
    moved = [np.concatenate([kind.vector.ravel() - 1 for kind in patch.values()]) for patch in (two, alone)]
    assert np.abs(moved[1]).max() > 0.05
    np.testing.assert_allclose(*moved, atol=1e-4)


def test_process_0_says_who_is_missing():
    begun, port = time.monotonic(), free_port()

    def probe():
        """Call as a health check does: connect, and reset."""
        while time.monotonic() < begun + 5:
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        probed = pool.submit(probe)
        with pytest.raises(FishjaxError, match=r"process 1, 2 of 3 did not call .* within 0.3 s"):
            mesh.connect(f"127.0.0.1:{port}", 3, 0, timeout=0.3)
        probed.result()
    with pytest.raises(FishjaxError, match=r"process 1 found no process 0 .* within 0.3 s"):
        mesh.connect(f"127.0.0.1:{free_port()}", 2, 1, timeout=0.3)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "call", [("nowhere", 2, 0), ("127.0.0.1:1x", 2, 0), ("127.0.0.1:80", 2, 2), ("127.0.0.1:80", None, 0)]
)
def test_arguments_that_make_no_sense_are_refused(call):
    with pytest.raises(UsageError, match="must be"):
        mesh.connect(*call, timeout=1)
    with pytest.raises(UsageError, match="above 0"):
        mesh.connect(*call, timeout=0)


def test_detectors_that_find_nobody_are_an_error_that_says_what_to_do():
    jax.devices()  # too late to connect, and nothing here to detect
    with pytest.raises(FishjaxError, match=r"within 1 s: .*; name process 0 by `address`"):
        mesh.connect(timeout=1)
