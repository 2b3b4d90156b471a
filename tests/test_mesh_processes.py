"""Two processes of two CPU devices each are one machine of four; a missing one is an error, not a hang."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fishjax import mesh
from fishjax.errors import FishjaxError, UsageError

HERE = pathlib.Path(__file__).parent
LIMIT = 150  # seconds, on a busy machine; alone it takes about 10


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*args):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "mesh_process.py"), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcomes(processes):
    """The last line that each printed; whatever happens, none of them is left running."""
    end, found = time.monotonic() + LIMIT, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1, end - time.monotonic()))
            assert process.returncode == 0, err[-3000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # SIGTERM is swallowed
                process.wait()
    return found


def test_two_processes_do_what_one_does(tmp_path):
    port = free_port()
    first, second, alone = outcomes(
        [start(port, 0, tmp_path, "two"), start(port, 1, tmp_path, "two"), start(0, 0, tmp_path, "alone")]
    )
    assert first == second and (first["devices"], first["here"], first["spec"]) == (4, 2, "fsdp")
    assert alone["here"] == 4
    for name in ("tuned", "fisher", "merged"):
        same = lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-6)
        jax.tree.map(same, first[name], alone[name], is_leaf=lambda x: isinstance(x, list))
    assert (tmp_path / "two").is_dir()


def test_process_0_says_who_is_missing():
    begun = time.monotonic()
    with pytest.raises(FishjaxError, match=r"process 1, 2 of 3 did not call .* within 0.3 s"):
        mesh.connect(f"127.0.0.1:{free_port()}", 3, 0, timeout=0.3)
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
