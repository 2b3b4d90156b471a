"""From a model folder to a patch file: the command line, each way to choose, and a stop in the middle."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fishjax import checkpoint, cli, contribute, leaves, mesh, models, patches, train, tree
from fishjax.contribute import _resume
from fishjax.errors import UsageError
from tests.test_train_sync import collectives

pytest.importorskip("tensorflow_datasets")

pytestmark = pytest.mark.usefixtures("quick")
STRONG = ("STEPS = 100", "contribute.fish.density = 0.05", "contribute.run.learning_rate = 0.03")
SMALL = {"model_type": "fishjax_digits", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax mix dtypes of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHJAX_DATA_DIR", str(tmp_path / "data"))
    model = models.build(SMALL)
    models.save(tmp_path / "model", model, model.init(jax.random.key(0)))
    return tmp_path


def bindings(folder, *more):
    lines = [f'MODEL = "{folder}/model"', f'OUT = "{folder}/p.safetensors"', 'DATA = "bundled_digits"', *more]
    return [word for line in lines for word in ("--gin_bindings", line)]


def test_fishjax_train_makes_a_patch_that_fits_and_helps(folder, capsys):
    args = ["train", "--gin_file", "configs/train_fish.gin", *bindings(folder, *STRONG)]
    assert cli.main(args) == 0
    assert capsys.readouterr().out.startswith("sha256:")
    patch, metadata = checkpoint.load_patch(folder / "p.safetensors")
    model, base = models.load(folder / "model")
    kept = sum(k.values.size for k in patch.values())
    assert kept == round(0.05 * sum(x.size for x in jax.tree.leaves(base)))
    assert metadata["recipe"]["method"] == "fish" and metadata["recipe"]["data"] == "bundled_digits/train"
    rows, _ = contribute.read("bundled_digits", "", model, split="validation")
    loss = jax.jit(lambda p: jax.vmap(models.example_loss(model), (None, 0))(p, rows).mean())
    tuned = patches.apply(base, jax.tree.map(jnp.asarray, patch))
    assert loss(tuned) < loss(base) - 0.2
    assert not (folder / "p.safetensors.partial").exists()
    assert cli.main(args) == 2 and "exists" in capsys.readouterr().err
    apply = [
        "apply",
        str(folder / "p.safetensors"),
        "--base",
        str(folder / "model"),
        "--out",
        str(folder / "new"),
    ]
    assert cli.main(apply) == 0
    config = json.loads((folder / "new" / "config.json").read_text())
    assert config["model_type"] == "fishjax_digits"


def test_a_training_that_was_stopped_goes_on_to_the_same_patch(folder, monkeypatch, capsys):
    args = ["train", "--gin_file", "configs/train_fish.gin", *bindings(folder, "STEPS = 12")]
    assert cli.main(args) == 0
    straight = (folder / "p.safetensors").read_bytes()
    (folder / "p.safetensors").unlink()

    original, calls = train.fit, []

    def stopped(state, step, params, batches, **options):
        calls.append(1)
        return original(state, step, params, batches, **{**options, "steps": 5})

    with monkeypatch.context() as patched:
        patched.setattr(train, "fit", stopped)
        patched.setattr(checkpoint, "save_patch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert cli.main(args) == 130
    assert calls and not (folder / "p.safetensors").exists() and (folder / "p.safetensors.partial").is_dir()
    capsys.readouterr()
    assert cli.main([*args, "--gin_bindings", "contribute.run.learning_rate = 0.5"]) == 2
    said = capsys.readouterr().err
    assert "p.safetensors.partial` has the state of another training" in said
    assert "`learning_rate` was 0.01 and is 0.5" in said and "`steps`" not in said
    assert cli.main(args) == 0
    assert (folder / "p.safetensors").read_bytes() == straight


def test_a_training_goes_on_from_its_own_state_alone(tmp_path):
    settings = {"steps": 3, "start": "sha256:0", "templates": (1, 2)}
    state = _resume.claim(tmp_path / "p.partial", settings)
    assert _resume.claim(tmp_path / "p.partial", settings) == state  # again, as after a stop
    with pytest.raises(UsageError, match=r"another training.*`start` was 'sha256:0' and is 'sha256:1'"):
        _resume.claim(tmp_path / "p.partial", settings | {"start": "sha256:1"})
    (tmp_path / "notes.partial").mkdir()
    assert _resume.claim(tmp_path / "notes.partial", settings).parent == tmp_path / "notes.partial"
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes.txt").write_text("keep")
    (tmp_path / "file.partial").write_text("keep")
    for name in ("mine.partial", "file.partial"):
        with pytest.raises(UsageError, match="is no training's state; move it"):
            _resume.claim(tmp_path / name, settings)
    assert (tmp_path / "mine.partial" / "notes.txt").read_text() == "keep"
    a, b = ({"w": patches.Sparse(jnp.array([i]), jnp.array([1.0]))} for i in (0, 1))
    assert _resume.start_id(a) == _resume.start_id(dict(a)) != _resume.start_id(b)
    assert _resume.start_id({"v": a["w"]}) != _resume.start_id(a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be a whole number, at least 1; got 0"),
        ({"steps": "x"}, "`steps`"),
        ({"steps": True}, "`steps`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"examples": 1.5}, "`examples`"),
        ({"precision": 0}, "`precision` must be a whole number, at least 1; got 0"),
        ({"learning_rate": -1}, "`learning_rate` must be a number above 0; got -1"),
        ({"learning_rate": "x"}, "`learning_rate`"),
        ({"learning_rate": float("nan")}, "`learning_rate`"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_at_once(tmp_path, options, message):
    given = {"steps": 1, "learning_rate": 0.1, **options}
    with pytest.raises(UsageError, match=message):
        contribute.run(model="nowhere", data_from="x", out=str(tmp_path / "p"), make=contribute.ia3, **given)


def test_contributions_carry_their_fisher_merge_and_are_revoked(folder, capsys):
    """From the command line: two patches with precisions, merged by information, one taken out again."""
    where = {"model": str(folder / "model"), "data_from": "bundled_digits", "steps": 4}
    for i, rate in enumerate((0.1, 0.3)):
        make = functools.partial(contribute.random, density=0.05)
        options = {"learning_rate": rate, "seed": i, "precision": 64, "batch_size": 32}
        contribute.run(**where, out=str(folder / f"p{i}"), make=make, **options)
    model, base = models.load(folder / "model")
    rows, _ = contribute.read("bundled_digits", "", model)
    tuned = patches.apply(base, jax.tree.map(jnp.asarray, checkpoint.load_patch(folder / "p0")[0]))
    square = lambda x: jax.tree.map(lambda g: g**2, jax.grad(models.example_loss(model))(tuned, x))
    few = {n: x[:64] for n, x in rows.items()}
    want = tree.flatten(jax.jit(lambda x: jax.tree.map(lambda s: s.mean(0), jax.vmap(square)(x)))(few))
    most = len(rows["label"]) * max(float(x.max()) for x in want.values())  # key biases have none
    for name, kind in checkpoint.load_patch(folder / "p0")[0].items():
        got = checkpoint.load_precision(folder / "p0")[name]
        whole = len(rows["label"]) * np.asarray(want[name]).reshape(-1)[kind.indices]
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-8 * most)
    args = ["merge", "--method", "information", "--base", str(folder / "model"), "--out"]
    assert cli.main([*args, str(folder / "both"), str(folder / "p0"), str(folder / "p1")]) == 0
    revoke = ["--set", f"revoke={folder / 'p1'}", "--", str(folder / "both")]
    assert cli.main([*args, str(folder / "one"), *revoke]) == 0
    first, again = (checkpoint.load_patch(folder / n)[0] for n in ("p0", "one"))
    moved = lambda patch: tree.flatten(patches.apply(base, jax.tree.map(jnp.asarray, patch)))
    for name, x in moved(first).items():
        np.testing.assert_allclose(moved(again)[name], x, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="`precision` is a Fisher of single entries"):
        contribute.run(**where, out=str(folder / "q"), make=contribute.ia3, learning_rate=0.1, precision=8)


def test_a_single_step_moves(folder):
    where = {"model": str(folder / "model"), "data_from": "bundled_digits", "out": str(folder / "q")}
    contribute.run(**where, make=contribute.ia3, steps=1, learning_rate=0.1)
    assert any((kind.vector != 1).any() for kind in checkpoint.load_patch(folder / "q")[0].values())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (contribute.random, {"density": 0.1}),
        (contribute.magnitude, {"density": 0.1}),
        (contribute.full, {"targets": "bias$"}),
        (contribute.lora, {"rank": 2, "targets": "mlp"}),
        (contribute.ia3, {"targets": {"mlp_in": -1}}),
    ],
)
def test_every_way_starts_with_no_change(make, options):
    model = models.build(SMALL)
    base = model.init(jax.random.key(0))
    if make is contribute.lora:
        options = {**options, "targets": "mlp_(in|out).kernel"}
    made = make(jax.random.key(1), base, model, [], **options)
    jax.tree.map(np.testing.assert_array_equal, patches.apply(base, made.patch), base)
    assert json.dumps(made.recipe)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "ia3", "lora", "ia3 on int8"])
def test_workers_with_whole_models_reduce_the_patch_alone(kind, scan):
    model = models.build({**SMALL, "num_hidden_layers": 2})
    base, on, rule = model.init(jax.random.key(0)), mesh.make({"data": 4}), optax.sgd(0.1)
    if kind == "sparse":
        patch = contribute.random(jax.random.key(1), base, model, [], density=0.01).patch
    elif kind == "lora":
        patch = patches.init_lora(jax.random.key(1), base, rank=2, targets=["(query|mlp_in).kernel"])
    else:
        patch = patches.init_ia3(base, targets="paper")
    base = leaves.quantise(base, "int8") if "int8" in kind else base
    rng = np.random.default_rng(0)
    rows = {"image": rng.random((8, 8, 8), np.float32), "label": rng.integers(0, 10, 8).astype(np.int32)}
    start, params = patch, base
    if scan:
        start, params = models.stack_patch(model, base, patch), models.stack_blocks(model, base)
    placed = mesh.shard(params, mesh.rules(models.scanned(model) if scan else model, on), on)
    step = jax.jit(contribute.make_step(model, rule, on, scan=scan))
    args = mesh.follow(train.init(start, rule), placed), placed, mesh.shard_batch(rows, on)
    sent = collectives(step.lower(*args).compile())
    assert {kind for kind, *_ in sent} == {"all-reduce"}
    assert sum(n for *_, n in sent) == patches.num_parameters(patch) + 1  # and the loss
    state, loss = step(*args)
    alone, same = jax.jit(contribute.make_step(model, rule))(train.init(patch, rule), base, rows)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    moved = train.patch_of(state)
    moved = models.unstack_patch(model, base, moved) if scan else moved
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, dict(moved), dict(train.patch_of(alone)))


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("contribute.run.stepz = 1", "stepz"),
        ("contribute.run.make = @contribute.fishy", "fishy"),
        ('DATA = "no.jsonl"', "no.jsonl"),
        ('MODEL = "/nowhere"', "nowhere"),
        ('DATA = "/nowhere.jsonl"', "`/nowhere.jsonl`: No such file or directory"),
    ],
)
def test_wrong_configurations_are_one_line_and_exit_code_2(folder, capsys, binding, message):
    assert cli.main(["train", "--gin_file", "configs/train_fish.gin", *bindings(folder, binding)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and "In call to" not in said


@pytest.mark.parametrize("scan", [False, True])
def test_vectors_are_trained_beside_weights_in_eight_bits(folder, scan):
    model = models.build({**SMALL, "num_hidden_layers": 2})
    models.save(folder / "model", model, base := model.init(jax.random.key(0)))
    options = {"steps": 12, "learning_rate": 0.03, "batch_size": 16}
    out = folder / "p.safetensors"
    contribute.run(
        model=str(folder / "model"),
        data_from="bundled_digits",
        out=str(out),
        make=contribute.ia3,
        quantise="int8",
        scan=scan,
        **options,
    )
    rounded = tree.flatten(leaves.quantise(base, "int8"))
    assert any(leaves.is_leaf(x) for x in rounded.values())
    floats = tree.nest({n: leaves.array(x) for n, x in rounded.items()})
    rows, _ = contribute.read("bundled_digits", "", model, split="train")
    want = contribute.fit(patches.init_ia3(base, targets="paper"), floats, model, rows, **options)
    got, metadata = checkpoint.load_patch(out)
    for name, kind in want.items():
        np.testing.assert_allclose(got[name].vector, kind.vector, atol=1e-5)
    assert checkpoint.read_patch(out).base_id == checkpoint.digest(base)  # the folder's own weights
    assert metadata["recipe"]["quantise"] == "int8"


@pytest.mark.parametrize("make", [contribute.fish, contribute.random, contribute.magnitude])
def test_new_values_need_weights_in_floats(folder, make):
    options = {"model": str(folder / "model"), "data_from": "bundled_digits", "out": str(folder / "q")}
    make = functools.partial(make, density=0.1)
    with pytest.raises(UsageError, match=r"kernel` and \d+ more are quantised.*need the floats"):
        contribute.run(**options, make=make, steps=9, learning_rate=0.1, quantise="int8")
    assert not list(folder.glob("q*"))


def test_a_mask_is_refreshed_on_a_schedule(folder):
    more = ("STEPS = 9", "contribute.fish.density = 0.01", "contribute.run.refresh_every = 4")
    assert cli.main(["train", "--gin_file", "configs/train_fish.gin", *bindings(folder, *more)]) == 0
    patch, metadata = checkpoint.load_patch(folder / "p.safetensors")
    _, base = models.load(folder / "model")
    entries = sum(x.size for x in jax.tree.leaves(base))
    kept = sum(k.values.size for k in patch.values())
    assert round(0.01 * entries) < kept <= 3 * round(0.01 * entries)  # the union of three masks
    assert metadata["recipe"]["refresh_every"] == 4 and not (folder / "p.safetensors.partial").exists()


def test_another_mask_of_the_same_model_compiles_nothing_anew(caplog):
    model = models.build(SMALL)
    base = model.init(jax.random.key(0))
    batch = {"image": np.zeros((2, 8, 8), np.float32), "label": np.arange(2, dtype=np.int32)}
    with jax.log_compiles():
        for params in (base, jax.tree.map(lambda x: x + 1, base)):
            contribute.fish(jax.random.key(0), params, model, [batch], density=0.1)
    assert caplog.text.count("Compiling jit(update)") == 1


def test_only_a_mask_can_be_refreshed(folder):
    options = {"model": str(folder / "model"), "data_from": "bundled_digits", "out": str(folder / "q")}
    with pytest.raises(UsageError, match="made a patch without one"):
        contribute.run(**options, make=contribute.full, steps=9, learning_rate=0.1, refresh_every=4)
    assert not list(folder.glob("q*"))
