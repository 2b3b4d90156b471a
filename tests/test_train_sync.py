"""Workers that share a patch against one device that has all of it, and what the compiled program sends."""

import json
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fishjax import data, leaves, masks, patches, train
from fishjax.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick")

WIDTH, HIDDEN = 6, 5


@pytest.fixture(autouse=True)
def double_and_standard_promotion():
    """Optax itself mixes int32 counts and Python floats."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def mesh_of(*shape, names=("data", "model")):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def problem(dtype=np.float64, width=WIDTH, hidden=HIDDEN):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(width, hidden)), "b": rng.normal(size=(hidden, 3)), "c": np.zeros(3)}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    rows = {"x": rng.normal(size=(48, width)).astype(dtype), "y": rng.normal(size=(48, 3)).astype(dtype)}

    def loss(params, example):
        out = jnp.tanh(example["x"] @ params["a"]) @ params["b"] + params["c"]
        return ((out - example["y"]) ** 2).sum()

    return params, rows, loss


def scores_of(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape)), params)


def close(a, b, tolerance=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def collectives(compiled):
    """Return (operation, dtype, numbers) of every collective in a compiled program."""
    text = compiled.as_text()
    found = []
    for result, kind in re.findall(
        r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\(", text
    ):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            found.append((kind, dtype, int(np.prod([int(n) for n in shape.split(",") if n]))))
    return found


def test_parallel_steps_are_the_steps_of_one_device():
    params, rows, loss = problem()
    patch = patches.init_sparse(params, masks.topk(scores_of(params), density=0.4))
    optimizer, batches = optax.adamw(1e-2), list(data.batches(rows, 16))
    alone, losses = train.fit(
        train.init(patch, optimizer), train.make_step(loss, optimizer), params, batches, steps=3
    )
    mesh = mesh_of(4, 2)
    params = {**params, "a": jax.device_put(params["a"], NamedSharding(mesh, P("model")))}
    step = train.make_parallel_step(loss, optimizer, mesh)
    together, same = train.fit(train.init(patch, optimizer), step, params, batches, steps=3)
    close((together.trainable, same), (alone.trainable, losses))


def test_a_parallel_step_reduces_the_masked_gradient_and_nothing_else():
    params, rows, loss = problem(np.float32, width=512, hidden=256)
    patch = patches.init_sparse(params, masks.topk(scores_of(params), density=0.005))
    total, kept = sum(x.size for x in jax.tree.leaves(params)), patches.num_parameters(patch)
    mesh, optimizer = mesh_of(8), optax.sgd(0.1)
    state = train.init(patch, optimizer)
    rows = {k: v[:16] for k, v in rows.items()}
    rows = jax.device_put(rows, NamedSharding(mesh, P("data")))

    def sent(step):
        found = collectives(jax.jit(step).lower(state, params, rows).compile())
        assert {(kind, dtype) for kind, dtype, _ in found} == {("all-reduce", "f32")}
        return sum(n for *_, n in found)

    assert sent(train.make_parallel_step(loss, optimizer, mesh)) == kept + 1  # and the loss
    assert train.bytes_sent(patch).values == 4 * kept
    assert sent(train.make_step(loss, optimizer)) >= 0.99 * total  # plain jit: the dense gradient
    assert total / kept == pytest.approx(200, rel=0.01)


def workers_by_hand(params, rows, loss, parts, outer, rounds, steps, patch):
    """Local steps in a plain loop: each worker trains its own patch, then the means are taken in numpy."""
    inner, workers = optax.adam(3e-2), len(parts)
    step = jax.jit(train.make_step(loss, inner))
    base, kept = patches.apply(params, patch), [None] * workers
    value = jax.tree.map(np.asarray, base)
    outer_state = outer.init(value)
    times = jax.tree.map(lambda *m: np.maximum(sum(np.asarray(x, int) for x in m), 1), *parts)
    size = len(rows["x"]) // rounds
    for number in range(rounds):
        here = {
            k: v[number * size : (number + 1) * size].reshape(workers, steps, -1, v.shape[1])
            for k, v in rows.items()
        }
        changes = []
        for worker, mask in enumerate(parts):
            state = train.init(patches.init_sparse(value, mask), inner)
            state = state._replace(opt_state=kept[worker] or state.opt_state)
            for i in range(steps):
                state, _ = step(state, value, {k: v[worker, i] for k, v in here.items()})
            kept[worker] = state.opt_state
            tuned = patches.apply(value, train.patch_of(state))
            changes.append(jax.tree.map(np.subtract, tuned, value))
        mean = jax.tree.map(lambda t, *c: -sum(c) / t, times, *changes)
        updates, outer_state = outer.update(mean, outer_state, value)
        value = jax.tree.map(lambda a, b: np.asarray(a + b), value, updates)
    return value


NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("which", ["same", "overlapping"])
def test_local_steps_are_those_of_workers_in_a_loop(which):
    params, rows, loss = problem()
    workers, rounds, steps = 2, 3, 4
    if which == "same":
        parts = [masks.topk(scores_of(params), density=0.4)] * workers
    else:  # dealt out by rank, but both train the last layer's bias
        parts = masks.split(scores_of(params), workers, density=0.3)
        parts = [masks.union(m, masks.by_name(params, "c")) for m in parts]
    patch = patches.init_sparse(params, masks.union(*parts))
    outer = NESTEROV if which == "same" else optax.sgd(1.0)
    ways = train.local_steps(loss, optax.adam(3e-2), outer, mesh_of(workers), steps=steps)
    state = ways.init(patch) if which == "same" else ways.init(patch, parts)
    state, losses = train.fit(state, ways.step, params, data.batches(rows, 16), steps=rounds)
    expected = workers_by_hand(params, rows, loss, parts, outer, rounds, steps, patch)
    close(patches.apply(params, train.patch_of(state)), expected)
    assert losses.shape == (rounds,) and int(state.step) == rounds
    moments = [x for x in jax.tree.leaves(state.opt_state.inner) if x.ndim == 2]
    assert [x.shape for x in moments] == [(workers, max(map(masks.count, parts)))] * 2  # 2k a worker


@pytest.mark.parametrize("unfold", [False, True])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_local_step_a_parallel_step_and_one_on_one_device_agree(kind, unfold):
    params, rows, loss = problem()
    if kind == "lora":
        patch = patches.init_lora(jax.random.key(0), params, rank=2, targets="^[ab]$")
    else:
        patch = patches.init_ia3(params, targets={"^[ab]$": -1})
    sgd = optax.sgd(0.05)
    alone, _ = train.fit(
        train.init(patch, sgd), train.make_step(loss, sgd), params, data.batches(rows, 16), steps=3
    )
    options = {"apply": patches.unfold} if unfold else {}
    loss = leaves.interpret(loss) if unfold else loss
    ways = train.local_steps(loss, sgd, optax.sgd(1.0), mesh_of(8), steps=1, **options)
    local, _ = train.fit(ways.init(patch), ways.step, params, data.batches(rows, 16), steps=3)
    step = train.make_parallel_step(loss, sgd, mesh_of(8), **options)
    parallel, _ = train.fit(train.init(patch, sgd), step, params, data.batches(rows, 16), steps=3)
    close(local.trainable, parallel.trainable)
    close(parallel.trainable, alone.trainable)


@pytest.mark.parametrize("disjoint", [False, True])
def test_int8_is_what_is_sent_and_what_it_rounds_is_sent_later(disjoint):
    params, rows, _ = problem(width=100)
    # Linear, so that no change has an influence on another.
    loss = lambda params, example: (example["x"] @ params["a"]).sum() * example["y"][0]
    parts = masks.split(scores_of(params), 4, density=0.22)  # 114 each
    mask = parts[0] if disjoint else masks.topk(scores_of(params), density=0.75)
    patch = patches.init_sparse(params, masks.union(*parts) if disjoint else mask)
    kept, batch = masks.count(mask), {k: v[:16] for k, v in rows.items()}
    ends = {}
    for wire in ("float", "int8"):
        ways = train.local_steps(loss, optax.sgd(1e-3), optax.sgd(1.0), mesh_of(4), steps=2, wire=wire)
        state = ways.init(patch, parts if disjoint else None)
        step = jax.jit(ways.step)
        found = [c for c in collectives(step.lower(state, params, batch).compile()) if c[2] > 1]
        sent = sum(n * {"s8": 1, "f32": 4, "f64": 8}[dtype] for _, dtype, n in found)
        received = 4 if wire == "int8" or disjoint else 1  # a gathered array has all four workers' parts
        assert sent == received * train.bytes_sent(patches.init_sparse(params, mask), wire=wire).values, found
        assert sent == received * (8 * kept if wire == "float" else kept + 4 * -(-kept // 256))
        ends[wire] = [state := step(state, params, batch)[0] for _ in range(5)]
    trainable = lambda state: np.concatenate([np.asarray(x) for x in jax.tree.leaves(state.trainable)])
    for exact, rounded in zip(ends["float"], ends["int8"]):
        # Rounding errors do not add up: what was held back last is all that is missing.
        late = np.asarray(rounded.opt_state.unsent)
        missing = trainable(exact) - trainable(rounded)
        np.testing.assert_allclose(
            np.sort(missing), np.sort(late.ravel() if disjoint else late.mean(0)), atol=1e-15
        )
    change = np.abs(trainable(ends["float"][0]) - trainable(ends["float"][1]))
    first = np.abs(np.asarray(ends["int8"][0].opt_state.unsent))
    assert first.max() > 0 and (not disjoint or first.max() <= change.max() / 254 * (1 + 1e-6))


def test_bad_arguments_are_refused():
    params, rows, loss = problem()
    parts = masks.split(scores_of(params), 2, density=0.3)
    patch, sgd = patches.init_sparse(params, masks.union(*parts)), optax.sgd(0.1)
    with pytest.raises(UsageError, match="no axis `rows`; it has `data`"):
        train.make_parallel_step(loss, sgd, mesh_of(2), axis="rows")
    step = train.make_parallel_step(loss, sgd, mesh_of(8))
    with pytest.raises(UsageError, match="12 examples cannot be shared out in 8 equal parts"):
        step(train.init(patch, sgd), params, {k: v[:12] for k, v in rows.items()})
    with pytest.raises(UsageError, match="at least 1; got 0"):
        train.local_steps(loss, sgd, sgd, mesh_of(2), steps=0)
    with pytest.raises(UsageError, match="`wire` must be"):
        train.local_steps(loss, sgd, sgd, mesh_of(2), steps=1, wire="int4")
    ways = train.local_steps(loss, sgd, sgd, mesh_of(2), steps=3)
    with pytest.raises(UsageError, match="in 6 equal parts"):
        ways.step(ways.init(patch), params, {k: v[:16] for k, v in rows.items()})
    with pytest.raises(UsageError, match="each of the 2 workers; got 1"):
        ways.init(patch, parts[:1])
    with pytest.raises(UsageError, match="mask 1 must keep entries of the patch only"):
        ways.init(patches.init_sparse(params, parts[0]), parts)
    with pytest.raises(UsageError, match="need a sparse patch"):
        ways.init(patches.init_dense(params), parts)


PROCESS = """
import json
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(
    sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method="deactivate", initialization_timeout=60,
    heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10,
)
jax.config.update("jax_enable_x64", True)
import numpy as np
from tests.test_train_sync import mesh_of, trained
print("ended", json.dumps([np.asarray(x).tolist() for x in trained(mesh_of(4))]))
"""


def trained(mesh):
    """Return what a parallel training and one with local steps of disjoint masks end in."""
    params, rows, loss = problem()
    parts = masks.split(scores_of(params), 4, density=0.2)
    patch, inner = patches.init_sparse(params, masks.union(*parts)), optax.adam(1e-2)
    step = train.make_parallel_step(loss, inner, mesh)
    first, _ = train.fit(train.init(patch, inner), step, params, data.batches(rows, 16), steps=3)
    ways = train.local_steps(loss, inner, NESTEROV, mesh, steps=2, wire="int8")
    second, losses = train.fit(ways.init(patch, parts), ways.step, params, data.batches(rows, 16), steps=3)
    return [*jax.tree.leaves(first.trainable), *jax.tree.leaves(second.trainable), losses]


def test_two_processes_train_as_one_does():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parent.parent
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", PROCESS, address, str(rank)],
        cwd=root,
        env={"PATH": "", "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = [start(0), start(1)]
    try:
        said = [p.communicate(timeout=120) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], said
    expected = trained(mesh_of(4))
    for out, _ in said:
        ended = next(line for line in out.splitlines() if line.startswith("ended "))  # gloo prints too
        close(json.loads(ended.removeprefix("ended ")), [np.asarray(x).tolist() for x in expected])
