"""Vetting in memory: good, poisoned and idle patches, and what each is told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import patches, tree, vet
from fishjax.errors import StructureError
from fishjax.vet._tests import judge
from tests.vet_world import CENTRES, WIDTH, apply, context, examples, finding, make


@pytest.fixture(scope="module")
def world():
    return make()


def test_a_good_patch_is_accepted(world):
    report = vet.run(context(world))
    assert (report.verdict, report.exit_code) == ("accept", 0), report
    rows = {r["name"]: r for r in finding(report, "tests").details["tests"]}
    assert rows["mirrored"]["accuracy_after"] > rows["mirrored"]["accuracy_before"] + 0.2
    assert rows["mirrored"]["claimed"] and rows["mirrored"]["gain"] < 1e-6
    assert not rows["held"]["claimed"] and rows["held"]["nfr_upper"] <= 0.02


def test_accuracies_and_flips_are_those_of_numpy(world):
    base, good, held = world
    row = finding(vet.run(context(world)), "tests").details["tests"][1]
    batch = held[1].batch
    before = np.asarray(apply(base, batch)).argmax(-1) == held[1].label
    after = np.asarray(apply(patches.apply(base, good), batch)).argmax(-1) == held[1].label
    assert row["accuracy_before"] == before.mean() and row["accuracy_after"] == after.mean()
    assert row["negative_flips"] == (before & ~after).sum()
    assert row["positive_flips"] == (~before & after).sum()


def test_a_poisoned_patch_is_refused_by_the_held_tests(world):
    base = world[0]
    swapped = jax.tree.map(jnp.array, base)
    kernel, bias = swapped["head"]["kernel"], swapped["head"]["bias"]
    order = np.array([1, 0, 2, 3])  # two classes change places
    swapped["head"] = {"kernel": kernel[:, order], "bias": bias[order]}
    report = vet.run(context(world, patches.diff(base, swapped), metadata={}), vet.CHECKS)
    assert (report.verdict, report.exit_code) == ("refuse", 1)
    row = finding(report, "tests").details["tests"][0]
    assert row["status"] == "fail" and row["loss"] < 1e-6
    assert {s["name"] for s in row["slices"][:2]} == {"label=0", "label=1"}  # where it went wrong


@pytest.mark.parametrize("kind", ["dense", "sparse", "scale"])
def test_a_patch_that_changes_nothing_is_refused(world, kind):
    base = world[0]
    idle = {
        "dense": lambda: patches.init_dense(base, "head"),
        "sparse": lambda: patches.init_sparse(base, jax.tree.map(lambda x: jnp.ones(x.shape, bool), base)),
        "scale": lambda: patches.init_ia3(base, targets={"block_0": -1}),
    }[kind]()
    report = vet.run(context(world, idle, metadata={}), vet.CHECKS)
    assert report.exit_code == 1 and "changes nothing" in finding(report, "size").summary


def test_a_tiny_test_set_is_inconclusive_and_says_how_many_are_needed(world):
    tiny = vet.pack("held", examples(6, 5))
    report = vet.run(context(world, tests=(tiny,), metadata={}), vet.CHECKS)
    assert (report.verdict, report.exit_code) == ("inconclusive", 7)
    assert finding(report, "tests").details["tests"][0]["examples_needed"] == 149


def test_without_held_tests_the_answer_is_inconclusive_unless_the_policy_allows_it(world):
    theirs = vet.pack("held", examples(600, 3), owner="contributor")
    for tests in ((), (theirs,)):
        assert vet.run(context(world, tests=tests), vet.CHECKS).exit_code == 7
    lenient = vet.Policy(require_tests=False)
    assert vet.run(context(world, tests=(), policy=lenient), vet.CHECKS).exit_code == 0
    assert vet.run(context(world)._replace(apply=None), vet.CHECKS).exit_code == 7


def test_a_false_claim_is_refused_and_an_unknown_one_is_told(world):
    report = vet.run(context(world, metadata={"claims": ["held"]}), vet.CHECKS)
    assert report.exit_code == 1 and "claimed gain" in finding(report, "tests").summary
    report = vet.run(context(world, metadata={"claims": ["mirrored", "poetry"]}), vet.CHECKS)
    assert report.exit_code == 0 and finding(report, "tests").status == "warn"
    assert "`poetry`" in finding(report, "tests").summary
    assert vet.run(context(world, metadata={"claims": 3}), vet.CHECKS).exit_code == 3


def test_a_test_that_the_base_does_not_support_yet_only_warns(world):
    base, _, held = world
    noise = jax.tree.map(jnp.array, base)
    noise["head"]["bias"] = noise["head"]["bias"] + jnp.array([0.0, 0.4, 0.0, -0.4])
    patch = patches.diff(base, noise)
    result = lambda tests, **limits: vet.run(
        context(world, patch, tests=tests, metadata={}, policy=vet.policy({"nfr_budget": 0.005, **limits})),
        vet.CHECKS,
    )
    row = lambda report: finding(report, "tests").details["tests"][-1]
    assert row(result(held)).items() >= {"name": "mirrored", "status": "fail"}.items()
    assert row(result(held))["accuracy_before"] < 0.9
    report = result(held, supported_accuracy=0.9)
    assert report.exit_code == 0 and row(report)["status"] == "warn" and row(report)["reasons"]
    assert result(held[1:], supported_accuracy=0.9).exit_code == 7  # then nothing decides


def test_limits_of_size_and_place_are_held(world):
    def code(**limits):
        report = vet.run(context(world, policy=vet.policy(limits)), vet.CHECKS)
        return report.exit_code, finding(report, "size").summary

    norm = finding(vet.run(context(world)), "size").details["relative_norm"]
    assert code(max_relative_norm=norm * 1.001, max_parameters=212)[0] == 0  # 9 * 16 + 17 * 4 numbers
    assert "max_relative_norm" in code(max_relative_norm=norm * 0.999)[1]
    for limits in (
        {"max_parameters": 211},
        {"max_fraction": 0.99},
        {"forbidden": ["^head"]},
        {"allowed": ["^block"]},
    ):
        assert code(**limits)[0] == 1, limits
    assert "head.bias" in code(allowed=["^block"])[1]
    assert code(allowed=["nope"])[0] == 2  # a rule that matches nothing is a mistake of the policy


def test_a_change_of_zeros_is_no_small_change(world):
    base = {"w": jnp.zeros(3), "v": jnp.ones(3)}
    idle = vet.size(vet.Context({"w": patches.Dense(-base["w"])}, base))  # -0.0 for 0.0
    assert idle.exit_code == 1 and "changes nothing" in idle.summary
    for name, norm, code in (("w", np.inf, 1), ("v", 1.0, 0)):
        patch = {name: patches.Dense(base[name] + jnp.ones(3))}
        size = vet.size(vet.Context(patch, base, policy=vet.policy({"max_relative_norm": 100})))
        assert (size.details["relative_norm"], size.exit_code) == (norm, code)


def test_predictions_that_are_not_finite_are_wrong():
    """argmax of NaN is 0, which is not to be taken for the label 0."""
    pack = vet.pack("p", {"x": np.ones((200, 2), np.float32), "label": np.zeros(200, np.int64)})
    broken = {"w": patches.Dense(-jnp.ones(2))}
    logits = lambda params, batch: jnp.log(params["w"])[None] * batch["x"]  # NaN for negative weights
    report = vet.run(vet.Context(broken, {"w": jnp.array([2.0, 1.0])}, logits, (pack,)), vet.CHECKS)
    assert report.exit_code == 1 and "not finite" in finding(report, "size").summary
    row = finding(report, "tests").details["tests"][0]
    assert (row["accuracy_before"], row["accuracy_after"], row["negative_flips"]) == (1, 0, 200)


def test_a_loss_is_shown_by_mcnemar_over_all_tests_even_on_few_examples():
    packs = [vet.pack(n, {"x": np.ones((20, 1)), "label": np.zeros(20, np.int64)}) for n in "abc"]
    kept, lost = np.ones(20, bool), np.arange(20) >= 6
    told = judge(vet.Context({}, {}, tests=packs), {"a": (kept, kept), "b": (kept, lost), "c": (kept, kept)})
    rows = {r["name"]: r for r in told.details["tests"]}
    assert rows["b"]["loss"] == pytest.approx(3 / 2**6)  # Holm over three tests
    assert any("accuracy fell by 30" in reason for reason in rows["b"]["reasons"])
    assert rows["a"]["loss"] == 1 and rows["a"]["status"] == "inconclusive" and told.exit_code == 1


def test_layers_are_ranked_by_change_or_by_fisher(world):
    base, good, _ = world
    size = finding(vet.run(context(world)), "size").details
    assert size["changed"] == sum(
        int((np.asarray(x) != np.asarray(y)).sum())
        for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(patches.apply(base, good)))
    )
    assert sorted(r["layer"] for r in size["layers"]) == ["block_0", "head"]
    assert sum(r["share"] for r in size["layers"]) == pytest.approx(1)
    fisher = tree.map_named(lambda name, x: jnp.full(x.shape, 1.0 if name.startswith("head") else 0.0), base)
    ranked = finding(vet.run(context(world, fisher=fisher), vet.CHECKS), "size").details["layers"]
    assert [r["layer"] for r in ranked] == ["head", "block_0"] and ranked[0]["share"] == 1


def test_a_patch_that_does_not_fit_is_told_and_not_applied(world):
    for patch in (
        {"nope": patches.Dense(jnp.ones(2))},
        {"head.bias": patches.Dense(jnp.ones(2))},
        {"head.bias": patches.Sparse(np.array([2, 1]), np.ones(2, np.float32))},
        {"head.bias": patches.Sparse(np.array([1, 4]), np.ones(2, np.float32))},
        {"head.bias": patches.Sparse(np.array([1, 2**32 + 2]), np.ones(2, np.float32))},
    ):
        report = vet.run(context(world, patch), vet.CHECKS)
        assert report.exit_code == 4 and finding(report, "structure").exit_code == 4
        assert [f.status for f in report.findings[-3:]] == ["skip"] * 3


def test_weights_that_overflow_are_refused(world):
    patch = {"head.kernel": patches.Scale(jnp.full((16, 1), 3e38))}
    report = vet.run(context(world, patch, metadata={}), vet.CHECKS)
    assert report.exit_code == 1 and "not finite" in finding(report, "size").summary
    json.loads(vet.to_json(report))


def test_exit_codes_add_up_by_priority():
    def check(code):
        status = "fail" if code else "pass"
        return lambda context: vet.Finding(f"c{code}", status, code, "", {})

    total = lambda *codes: vet.run(vet.Context({}, {}), [check(c) for c in codes]).exit_code
    assert total(0, 0) == 0 and total(7, 0) == 7 and total(7, 1) == 1 and total(1, 4, 7) == 4
    assert total(1, 5, 6) == 6
    stopped = vet.run(vet.Context({}, {}), [check(4), check(3), check(1)])
    assert stopped.exit_code == 3 and len(stopped.findings) == 2
    assert vet.run(vet.Context({}, {}, findings=stopped.findings), [check(1)]) == stopped

    def raises(context):
        raise StructureError("does not fit")

    assert vet.run(vet.Context({}, {}), [raises]).findings[0] == vet.Finding(
        "raises", "fail", 4, "does not fit", {}
    )


def test_invariance_and_direction_are_tested(world):
    base = world[0]
    held = examples(300, 7)
    noisy = held["x"] + np.random.default_rng(0).normal(size=held["x"].shape).astype(np.float32) * 0.1
    inv = vet.pack("noise", {"x": held["x"], "changed.x": noisy}, kind="inv")
    towards = (0.5 * held["x"] + 0.5 * CENTRES[held["label"]]).astype(np.float32)
    pull = vet.pack("pull", {"x": held["x"], "changed.x": towards, "label": held["label"]}, kind="dir")
    away = (2 * held["x"] - CENTRES[held["label"]] * 2).astype(np.float32)
    push = vet.pack("push", {"x": held["x"], "changed.x": away, "label": held["label"]}, kind="dir")
    report = vet.run(context(world, tests=(inv, pull, push), metadata={}), vet.CHECKS)
    rows = {r["name"]: r["accuracy_before"] for r in finding(report, "tests").details["tests"]}
    same = np.asarray(apply(base, {"x": held["x"]})).argmax(-1) == np.asarray(
        apply(base, {"x": noisy})
    ).argmax(-1)
    assert rows["noise"] == same.mean() > 0.95
    log_p = lambda x: np.asarray(jax.nn.log_softmax(apply(base, {"x": x}))[np.arange(300), held["label"]])
    for name, altered in (("pull", towards), ("push", away)):
        sure = np.abs(log_p(altered) - log_p(held["x"])) > 1e-6  # the rest is float32's rounding
        rose = log_p(altered) > log_p(held["x"])
        assert rows[name] == pytest.approx(rose[sure].mean(), abs=2 * (1 - sure.mean()) + 1e-9)
    assert rows["pull"] > 0.7 > 0.2 > rows["push"]


def test_labels_of_tokens_count_only_where_they_are_given(world):
    """Two tokens an example; -100 does not count, and an example is right if all that count are."""
    base, _, _ = world
    one = examples(200, 8)
    two = examples(200, 9)
    x = np.stack([one["x"], two["x"]], 1)
    labels = np.stack([one["label"], np.where(np.arange(200) % 2, two["label"], -100)], 1)
    pack = vet.pack("tokens", {"x": x, "labels": labels})
    report = vet.run(context(world, tests=(pack,), metadata={}), vet.CHECKS)
    hit = (np.asarray(apply(base, {"x": x})).argmax(-1) == labels) | (labels == -100)
    row = finding(report, "tests").details["tests"][0]
    assert row["accuracy_before"] == hit.all(1).mean()
    assert finding(report, "size").details["kl"]["tokens"]["predictions"] == 300


def test_a_language_models_own_labels_are_used(world):
    """It predicts the next token: labels move by one, and what has no next token does not count."""
    base, _, _ = world
    one = examples(300, 8)
    x, label = one["x"].reshape(100, 3, WIDTH), one["label"].reshape(100, 3)
    shifted = np.concatenate([np.full((100, 1), -100), label[:, :-1]], 1)  # the label of the one before
    given = {
        "labels": lambda example: jnp.roll(example["labels"], -1),
        "token_mask": lambda example: jnp.arange(3) < 2,
    }
    pack = vet.pack("next", {"x": x, "labels": shifted})
    report = vet.run(context(world, tests=(pack,), metadata={}, **given))
    hit = np.asarray(apply(base, {"x": x})).argmax(-1) == label
    assert finding(report, "tests").details["tests"][0]["accuracy_before"] == hit[:, :2].all(1).mean()
    assert finding(report, "size").details["kl"]["next"]["predictions"] == 200


def test_a_slice_that_falls_is_a_warning(world):
    base, _, held = world
    worse = jax.tree.map(jnp.array, base)
    worse["head"]["bias"] = worse["head"]["bias"].at[3].add(-6.0)
    before, after = (np.asarray(apply(p, held[0].batch)).argmax(-1) == held[0].label for p in (base, worse))
    lost, kept = np.flatnonzero(before & ~after), np.flatnonzero(before & after)
    part = np.isin(np.arange(600), [lost[0], kept[0]])  # half of it is lost
    marked = held[0]._replace(slices={"rare": part})
    lax = vet.policy({"nfr_budget": 0.5, "non_inferiority_margin": 0.3})
    report = vet.run(
        context(world, patches.diff(base, worse), tests=(marked,), metadata={}, policy=lax), vet.CHECKS
    )
    assert report.exit_code == 0 and finding(report, "tests").status == "warn"
    assert "slice `rare`" in finding(report, "tests").summary
