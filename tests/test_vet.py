"""Vetting from end to end: good, poisoned, idle and broken patches, and what each is told."""

import json
import struct
import subprocess
import sys
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import checkpoint, models, patches, tree, vet
from fishjax.checkpoint._safetensors import SEAL
from fishjax.cli import main
from fishjax.errors import StructureError, UsageError
from fishjax.vet._tests import judge

CLASSES, WIDTH = 4, 8
CENTRES = np.random.default_rng(1).normal(size=(CLASSES, WIDTH)).astype(np.float32) * 2


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(16, name="block_0")(x)))


def apply(params, batch):
    return MLP().apply({"params": params}, batch["x"])


def examples(n, seed, mirrored=False):
    """Points around one centre a class; in the other world their axes come in reverse."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n)
    x = CENTRES[label] + 0.5 * rng.normal(size=(n, WIDTH)).astype(np.float32)
    return {"x": (x[:, ::-1] if mirrored else x).astype(np.float32), "label": label}


def train(params, *batches, steps=300):
    def loss(p):
        return sum(
            -jnp.take_along_axis(jax.nn.log_softmax(apply(p, b)), jnp.asarray(b["label"])[:, None], 1).mean()
            for b in batches
        )

    step = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(loss)(p)))
    for _ in range(steps):
        params = step(params)
    return params


@pytest.fixture(scope="module")
def world():
    """A base, a good patch that raises the mirrored world, and held packs of both worlds."""
    old, new = examples(400, 0), examples(400, 2, mirrored=True)
    base = train(MLP().init(jax.random.key(0), old["x"][:1])["params"], old)
    good = patches.diff(base, train(base, old, new, steps=400))
    held = (vet.pack("held", examples(600, 3)), vet.pack("mirrored", examples(600, 4, mirrored=True)))
    return base, good, held


def context(world, patch=None, **fields):
    base, good, held = world
    given = {"tests": held, "metadata": {"claims": ["mirrored"]}, **fields}
    return vet.Context(good if patch is None else patch, base, apply, **given)


def finding(report, name):
    return next(f for f in report.findings if f.name == name)


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


# Files: what `fishjax vet` is given.


@pytest.fixture
def folder(tmp_path, world):
    base, good, held = world
    checkpoint.save_params(tmp_path / "base.safetensors", base)
    checkpoint.save_patch(tmp_path / "good", good, base=base, metadata={"claims": ["mirrored"]})
    (tmp_path / "tests").mkdir()
    for pack in held:
        vet.save_pack(tmp_path / "tests" / f"{pack.name}.safetensors", pack)
    return tmp_path


def rewrite(path, change):
    """Change a patch file's header and seal it again, as someone who knows the format would."""
    import hashlib

    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head, body = change(data[8 : 8 + length].decode(), data[8 + length :])
    raw = head.encode()
    raw += b" " * (-len(raw) % 8)
    data = struct.pack("<Q", len(raw)) + raw + body
    at = data.index(f'"{SEAL}":"'.encode()) + len(SEAL) + 4
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    path.write_bytes(blank[:at] + hashlib.sha256(blank).hexdigest().encode() + blank[at + 64 :])


def truncated(path, world):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path, world):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def doubled(path, world):
    rewrite(path, lambda head, body: (head.replace("{", '{"__metadata__":{},', 1), body))


def overlapping(path, world):
    def change(head, body):
        table = json.loads(head)
        table["x::y"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False), body

    rewrite(path, change)


def out_of_range(path, world):
    """A patch for a longer leaf, its manifest made to say that it is for this one."""
    long = {"w": np.zeros(9, np.float32)}
    patch = {"w": patches.Sparse(np.array([1, 8]), np.ones(2, np.float32))}
    checkpoint.save_patch(path, patch, base=long)
    rewrite(path, lambda head, body: (head.replace('\\"shape\\":[9]', '\\"shape\\":[8]'), body))


def not_a_number(path, world):
    """NaN written into the values of a file that is otherwise right."""

    def change(head, body):
        table = json.loads(head)
        spot = next(v["data_offsets"][0] for k, v in table.items() if k.endswith("::values"))
        return head, body[:spot] + struct.pack("<f", float("nan")) + body[spot + 4 :]

    rewrite(path, change)


def other_base(path, world):
    base, good, _ = world
    other = jax.tree.map(jnp.array, base)
    other["head"]["bias"] = other["head"]["bias"].at[0].add(1e-6)
    checkpoint.save_patch(path, good, base=other)


def other_untouched_leaf(path, world):
    base = world[0]
    other = jax.tree.map(jnp.array, base)
    other["head"]["bias"] = other["head"]["bias"].at[0].add(1e-6)
    checkpoint.save_patch(path, {"block_0.bias": patches.Dense(jnp.ones(16))}, base=other)


def other_model(path, world):
    checkpoint.save_patch(path, {"w": patches.Dense(jnp.ones(3))}, base={"w": jnp.zeros(3)})


def pickled(path, world):
    path.write_bytes(b"\x80\x04K*.")


BAD = [
    (truncated, 3, "integrity"),
    (flipped, 3, "corrupt"),
    (doubled, 3, "twice"),
    (overlapping, 3, "overlaps"),
    (out_of_range, 3, "reach from 1 to 8"),
    (pickled, 3, "pickle"),
    (not_a_number, 1, "NaN"),
    (other_base, 4, "head.bias"),
    (other_untouched_leaf, 4, "another|for base"),
    (other_model, 4, "`w`"),
]


@pytest.mark.parametrize(("spoil", "code", "says"), BAD, ids=[b[0].__name__ for b in BAD])
def test_bad_files_have_their_exit_code_and_one_line(folder, world, capsys, spoil, code, says):
    bad = folder / "good"
    spoil(bad, world)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    got = main(["vet", str(bad), "--base", str(folder / "base.safetensors")])
    out, err = capsys.readouterr()
    assert got == code, (out, err)
    import re

    assert re.search(says, err) and len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing", "--base", "BASE"], "missing"),
        (["good", "--base", "nowhere"], "nowhere"),
        (["good"], "--base"),
        (["good", "--base", "BASE", "--nonsense"], "nonsense"),
        (["good", "--base", "BASE", "--tests", "nowhere"], "nowhere"),
        (["good", "--base", "BASE", "--policy", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_usage_errors(folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    got = main(["vet", *("base.safetensors" if a == "BASE" else a for a in arguments)])
    out, err = capsys.readouterr()
    assert got == 2 and says in err and len(err.splitlines()) == 1 and not out


def test_a_base_that_cannot_be_run_is_inconclusive(folder, capsys):
    arguments = ["vet", str(folder / "good"), "--base", str(folder / "base.safetensors")]
    assert main([*arguments, "--tests", str(folder / "tests")]) == 7
    assert "give its folder" in capsys.readouterr().out


def test_a_model_folder_is_run_on_its_tests_and_tasks(tmp_path, capsys, key):
    config = {
        "model_type": "fishjax_digits",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    model = models.build({**config, "intermediate_size": 8})
    base = model.init(key)
    models.save(tmp_path / "base", model, base)
    image = np.random.default_rng(0).random((200, 8, 8)).astype(np.float32)
    label = np.asarray(model.apply(base, {"image": image})).argmax(-1)  # so the base is always right
    for folder in ("tests", "tasks"):
        (tmp_path / folder).mkdir()
    vet.save_pack(tmp_path / "tests" / "held.safetensors", vet.pack("held", {"image": image, "label": label}))
    kinds = {"head.classifier.bias": patches.Sparse(np.array([0]), np.array([1e-4], np.float32))}
    checkpoint.save_patch(tmp_path / "mild", kinds, base=base)
    checkpoint.save_patch(tmp_path / "tasks" / "task", kinds, base=base)
    kinds = {"head.classifier.bias": patches.Dense(np.arange(10, dtype=np.float32))}
    checkpoint.save_patch(tmp_path / "wild", kinds, base=base)
    for name, code in (("mild", 0), ("wild", 1)):
        where = [
            "--base",
            tmp_path / "base",
            "--tests",
            tmp_path / "tests",
            "--downstream",
            tmp_path / "tasks",
        ]
        assert main(["vet", str(tmp_path / name), *map(str, where), "--json"]) == code
        told = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
        assert told["tests"]["details"]["tests"][0]["accuracy_before"] == 1
        assert told["downstream"]["details"]["tests"][0]["name"] == "task/held"
        assert told["tests"]["exit_code"] == told["downstream"]["exit_code"] == code


def test_misfits_are_told_without_jax(folder, world):
    other_base(folder / "good", world)
    code = (
        "import sys; from fishjax.cli import main; "
        f"code = main(['vet', {str(folder / 'good')!r}, '--base', {str(folder / 'base.safetensors')!r}]); "
        "assert code == 4, code; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_result_that_is_not_what_the_file_says_is_corrupt(folder, world):
    import re

    rewrite(
        folder / "good",
        lambda head, body: (
            re.sub(r'(\\"results\\":{\\"[^"]*\\":\\"sha256:)[0-9a-f]{8}', r"\g<1>00000000", head),
            body,
        ),
    )
    report = vet.files(folder / "good", folder / "base.safetensors")
    assert report.exit_code == 3 and "does not come out" in report.findings[-1].summary


def test_reports_are_equal_bytes_and_well_formed(folder, world):
    reports = [vet.run(context(world)) for _ in range(2)]
    for write in (vet.to_text, vet.to_json, vet.to_markdown, vet.to_junit):
        assert write(reports[0], patch="p") == write(reports[1], patch="p")
    told = json.loads(vet.to_json(reports[0]))
    assert told["verdict"] == "accept" and [f["name"] for f in told["findings"]] == [
        "integrity",
        "base",
        "structure",
        "size",
        "tests",
        "downstream",
    ]
    suite = ElementTree.fromstring(vet.to_junit(reports[0], patch="p"))
    assert suite.get("failures") == "0" and len(suite) == 6
    told = vet.to_markdown(reports[0])
    kl = finding(reports[0], "size").details["kl"]["held"]["measured"]
    assert "| mirrored | 600 |" in told and f"| held | {kl:.2e} |" in told


def test_hostile_names_reach_no_terminal_and_break_no_table(world):
    name = "a|b\x1b[31m\n<script>"
    report = vet.run(context(world, metadata={"claims": [name]}), vet.CHECKS)
    assert "\x1b" not in vet.to_text(report) and "\x1b" not in vet.to_junit(report)
    ElementTree.fromstring(vet.to_junit(report))
    line = next(x for x in vet.to_markdown(report).splitlines() if x.startswith("| tests"))
    assert "<script>" not in line and "\x1b" not in line and r"a\|b" in line


def test_outputs_are_written_and_init_gives_the_defaults(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    lenient = folder / "lenient.yaml"
    lenient.write_text("require_tests: false\n")
    arguments = ["vet", "good", "--base", "base.safetensors", "--policy", "lenient.yaml"]
    assert main([*arguments, "--json", "--markdown", "r.md", "--junit", "r.xml"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "accept"
    assert "accept" in (folder / "r.md").read_text()
    assert ElementTree.parse(folder / "r.xml").getroot().get("tests") == "6"
    assert main(["vet", "--init"]) == 0
    assert vet.load_policy(folder / "vet.yaml") == vet.Policy()
    assert main(["vet", "--init"]) == 2  # nothing is written over


def test_without_policy_and_tests_only_the_file_is_asked_for(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["vet", "good", "--base", "base.safetensors"]) == 0
    assert "no held test was given" in capsys.readouterr().out
    (folder / "strict.yaml").write_text("nfr_budget: 0.02\n")
    assert main(["vet", "good", "--base", "base.safetensors", "--policy", "strict.yaml"]) == 7


def test_packs_keep_what_they_hold(tmp_path):
    pack = vet.pack(
        "p",
        {
            "x": np.ones((3, 2), np.float32),
            "label": np.array([0, 1, 2]),
            "slice.s": np.array([True, False, True]),
        },
        owner="contributor",
    )
    vet.save_pack(tmp_path / "p.safetensors", pack)
    got = vet.load_packs(tmp_path)[0]
    jax.tree.map(np.testing.assert_array_equal, got, pack)


@pytest.mark.parametrize(
    ("arrays", "kind", "says"),
    [
        ({"x": np.ones((3, 2)), "label": np.arange(2)}, "mft", "as many examples"),
        ({"x": np.ones((3, 2))}, "mft", "no `label`"),
        ({"label": np.arange(2)}, "mft", "no inputs"),
        ({"x": np.ones((2, 2)), "label": np.ones(2)}, "mft", "integers"),
        ({"x": np.ones((2, 2)), "label": np.arange(2), "labels": np.arange(2)}, "mft", "both"),
        ({"x": np.ones((2, 2)), "label": np.arange(2)}, "magic", "kind"),
        ({"x": np.ones((2, 2)), "label": np.arange(2)}, "dir", "changed"),
        ({"x": np.ones((2, 2)), "changed.y": np.ones((2, 2))}, "inv", "changed.y"),
        ({"x": np.full((2, 2), np.nan), "label": np.arange(2)}, "mft", "NaN"),
        ({"x": np.ones((0, 2)), "label": np.arange(0)}, "mft", "at least 1"),
        ({"x": np.ones((2, 2)), "label": np.arange(2), "slice.s": np.arange(2)}, "mft", "bool"),
    ],
)
def test_packs_that_make_no_sense_are_refused(arrays, kind, says):
    with pytest.raises(ValueError, match=says):
        vet.pack("p", arrays, kind=kind)


def test_labels_that_do_not_fit_the_model_are_told(world):
    pack = vet.pack("p", {"x": np.ones((200, 8), np.float32), "labels": np.zeros((200, 3), np.int64)})
    report = vet.run(context(world, tests=(pack,), metadata={}), vet.CHECKS)
    assert finding(report, "tests").exit_code == 4 and "predictions" in finding(report, "tests").summary


def test_text_without_a_tokenizer_says_what_to_do(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        vet.load_packs(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(ValueError, match="line 1"):
        vet.load_packs(tmp_path)


def test_text_is_encoded_by_the_models_own_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    config = {
        "model_type": "bert",
        "vocab_size": 3,
        "hidden_size": 4,
        "num_attention_heads": 1,
        "pad_token_id": 0,
    }
    config |= {
        "num_hidden_layers": 1,
        "intermediate_size": 4,
        "max_position_embeddings": 8,
        "type_vocab_size": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "t.jsonl").write_text(
        '{"pack": {"kind": "inv", "owner": "contributor"}}\n'
        '{"text": "a b", "changed": "b", "slices": ["s"]}\n{"text": "b", "changed": "a c b"}\n'
    )
    pack = vet.load_packs(tmp_path, model=tmp_path)[0]
    assert (pack.kind, pack.owner) == ("inv", "contributor")
    np.testing.assert_array_equal(pack.batch["input_ids"], [[1, 2, 0], [2, 0, 0]])
    np.testing.assert_array_equal(pack.changed["input_ids"], [[2, 0, 0], [1, 0, 2]])
    np.testing.assert_array_equal(pack.changed["attention_mask"], [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(pack.slices["s"], [True, False])
