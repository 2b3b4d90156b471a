"""The downstream suite: what others built on the base must survive a change to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, patches, vet
from fishjax.errors import UsageError
from fishjax.vet._downstream import reapplied

RNG = np.random.default_rng(0)
N, WIDTH = 400, 6


def apply(params, batch):
    """Two tasks in one model: the sign of `x @ w`, on inputs that are first turned by `turn`."""
    score = jnp.einsum("bi,ij,j->b", batch["x"], params["turn"], params["w"])
    return jnp.stack([-score, score], -1)


@pytest.fixture
def case():
    w = RNG.normal(size=WIDTH).astype(np.float32)
    turn = np.eye(WIDTH, dtype=np.float32)
    base = {"turn": jnp.asarray(turn), "w": jnp.asarray(w)}
    x = RNG.normal(size=(N, WIDTH)).astype(np.float32)
    x = x[np.abs(x @ w) > 0.5]
    mirror = turn[::-1]
    task = {"turn": patches.Dense(jnp.asarray(mirror.copy()))}  # reads its inputs in reverse
    own = vet.pack("own", {"x": x, "label": (x @ w > 0).astype(np.int64)})
    theirs = vet.pack("reversed", {"x": x[:, ::-1].copy(), "label": (x @ w > 0).astype(np.int64)})
    return base, task, own, theirs


def vetted(case, patch, **fields):
    base, task, own, theirs = case
    given = {"downstream": {"rev": vet.Task(task, ("reversed",))}, **fields}
    policy = vet.policy({"tests": {"reversed": {"nfr_budget": 0.99, "non_inferiority_margin": 0.99}}})
    return vet.run(vet.Context(patch, base, apply, (own, theirs), policy, **given), vet.CHECKS).findings[-1]


def test_a_harmless_change_keeps_the_tasks(case):
    base = case[0]
    finding = vetted(case, {"w": patches.Dense(base["w"] * 1.01)})
    assert (finding.name, finding.status, finding.exit_code) == ("downstream", "pass", 0)
    row = finding.details["tests"][0]
    assert row["name"] == "rev/reversed" and row["accuracy_before"] == row["accuracy_after"] == 1
    assert len(finding.details["tests"]) == 1  # only what the task claims


def test_a_change_that_breaks_a_task_is_refused_though_its_own_tests_pass(case):
    """The patch turns inputs and weights alike: the model is as good as before, the task is lost."""
    base = case[0]
    order = np.roll(np.arange(WIDTH), 1)
    patch = {
        "turn": patches.Dense(jnp.asarray(np.eye(WIDTH, dtype=np.float32)[:, order])),
        "w": patches.Dense(base["w"][order]),
    }
    report = vet.run(vet.Context(patch, base, apply, case[2:3], metadata={}), vet.CHECKS)
    assert report.exit_code == 0
    finding = vetted(case, patch)
    assert finding.exit_code == 1 and finding.details["tests"][0]["accuracy_after"] < 0.9


def test_tasks_without_claims_are_tried_on_every_test(case):
    base, task, _, _ = case
    finding = vetted(case, {"w": patches.Dense(base["w"] * 1.01)}, downstream={"rev": vet.Task(task)})
    assert [r["name"] for r in finding.details["tests"]] == ["rev/own", "rev/reversed"]


def test_without_a_model_it_is_inconclusive_and_without_tasks_skipped(case):
    base, task, own, _ = case
    patch = {"w": patches.Dense(base["w"] * 1.01)}
    cut = vet.Context(patch, base, None, (own,), downstream={"rev": vet.Task(task)})
    assert vet.downstream(cut).exit_code == 7
    assert vet.downstream(cut._replace(downstream={})).status == "skip"


@pytest.mark.parametrize("kind", ["scale", "low_rank", "sparse", "dense"])
def test_a_task_on_an_unchanged_base_is_the_task(case, kind, key):
    base = case[0]
    task = {
        "scale": {"turn": patches.Scale(jnp.full((1, WIDTH), 3.0))},
        "low_rank": {"turn": patches.LowRank(jnp.ones((WIDTH, 1, 1)), jnp.ones((1, WIDTH, 1)), 0.5)},
        "sparse": {"w": patches.Sparse(jnp.array([1, 4]), jnp.array([7.0, 8.0]))},
        "dense": {"w": patches.Dense(jax.random.normal(key, (WIDTH,)))},
    }[kind]
    jax.tree.map(np.testing.assert_array_equal, reapplied(base, base, task), patches.apply(base, task))
    changed = jax.tree.map(lambda x: x + 1, base)
    got = reapplied(base, changed, task)
    if kind in ("scale", "low_rank"):
        jax.tree.map(np.testing.assert_array_equal, got, patches.apply(changed, task))
    else:
        old, now, tuned = (np.float64(x["w"]) for x in (base, changed, patches.apply(base, task)))
        # In float64 the sum is exact to 1e-15: what is left is one rounding to float32.
        np.testing.assert_allclose(got["w"], now + (tuned - old), rtol=2**-24, atol=1e-14)


def test_the_folder_is_read_and_held_to_the_base(tmp_path, case):
    base, task, _, _ = case
    checkpoint.save_patch(tmp_path / "rev", task, base=base, metadata={"claims": ["reversed"]})
    tasks = vet.load_downstream(tmp_path, base_id=checkpoint.digest(base))
    assert list(tasks) == ["rev"] and tasks["rev"].claims == ("reversed",)
    with pytest.raises(UsageError, match="`rev` is for base"):
        vet.load_downstream(tmp_path, base_id=checkpoint.digest({"w": base["w"]}))
    with pytest.raises(UsageError, match="no folder"):
        vet.load_downstream(tmp_path / "nowhere", base_id="")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no patch"):
        vet.load_downstream(tmp_path / "empty", base_id="")


def test_new_values_come_bit_for_bit_where_the_base_did_not_change():
    base = {"w": jnp.array([1e30, 2.0], jnp.float32)}
    changed = {"w": jnp.array([1e30, 3.0], jnp.float32)}
    task = {"w": patches.Dense(jnp.array([1e-10, 2.5], jnp.float32))}
    np.testing.assert_array_equal(reapplied(base, changed, task)["w"], np.float32([1e-10, 3.5]))
