"""`fishjax train` with the recipe of T-Few: pre-training on a mixture, then few shots from that patch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fishjax import checkpoint, cli, contribute, data, mesh, models, patches, train

pytest.importorskip("gin")
pytest.importorskip("tokenizers")
from tests.test_templates import CONFIG, tokenizer

pytestmark = pytest.mark.usefixtures("quick")

TEMPLATES = {
    "templates": [
        {"input": "{word} is", "choices": ["red", "blue"]},
        {"input": "is {word}", "choices": ["red", "blue"]},
    ]
}

T0 = {"remat": True, "scan": True}  # as in configs/tfew/t0_3b.gin


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax mix dtypes of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def world(tmp_path):
    """A tiny T5 and a task in a folder, and `fit(config, name of the patch, *bindings)`."""
    model = models.build(CONFIG)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    models.save(tmp_path / "model", model, params)
    tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "task.yaml").write_text(json.dumps(TEMPLATES))
    lines = [{"word": word, "label": label} for word, label in [("sky", 1), ("green", 0)] * 4]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def fit(config, out, *bindings):
        names = {"MODEL": tmp_path / "model", "DATA": tmp_path / "task.jsonl", "OUT": tmp_path / out}
        names["TEMPLATES"] = tmp_path / "task.yaml"
        lines = [*(f'{n} = "{p}"' for n, p in names.items()), "STEPS = 30", *bindings]
        words = [word for line in lines for word in ("--gin_bindings", line)]
        return cli.main(["train", "--gin_file", f"configs/{config}.gin", *words])

    return model, params, fit


def test_from_a_mixture_to_few_shots(tmp_path, world, capsys):
    model, params, fit = world
    other = {"text": "blue", "choices": ["red", "green", "sky"], "answer": 2}
    (tmp_path / "other.jsonl").write_text(json.dumps(other))
    mixture = f'["{tmp_path}/task.jsonl", "{tmp_path}/other.jsonl"]'
    pretraining = [
        f"contribute.run.data_from = {mixture}",
        f'contribute.run.templates = ["{tmp_path}/task.yaml", None]',
        "contribute.run.limit = 4",
    ]
    assert fit("tfew/pretrain", "pre.safetensors", *pretraining) == 0
    start = [
        f'PRETRAINED = "{tmp_path}/pre.safetensors"',
        "contribute.run.learning_rate = 0.1",
        "contribute.run.shots = 6",
    ]
    assert fit("tfew/few_shot", "few.safetensors", *start) == 0
    patch, metadata = checkpoint.load_patch(tmp_path / "few.safetensors")
    assert metadata["recipe"]["method"] == "ia3" and metadata["recipe"]["from"]["steps"] == 30
    assert all(isinstance(kind, patches.Scale) for kind in patch.values())

    assert metadata["recipe"]["data"].endswith(", 6 shots of seed 0")

    rows, _ = contribute.read(
        str(tmp_path / "task.jsonl"), str(tmp_path / "model"), model, templates=str(tmp_path / "task.yaml")
    )
    assert data.examples(rows) == 16
    some, _ = contribute.read(
        str(tmp_path / "task.jsonl"),
        str(tmp_path / "model"),
        model,
        templates=str(tmp_path / "task.yaml"),
        shots=6,
    )
    assert data.examples(some) == 12  # each under both templates
    loss = jax.jit(lambda p: jax.vmap(train.tfew_loss(model), (None, 0))(p, rows).mean())
    tuned, pretrained = (
        patches.apply(params, jax.tree.map(jnp.asarray, checkpoint.load_patch(tmp_path / f)[0]))
        for f in ("few.safetensors", "pre.safetensors")
    )
    assert loss(tuned) < loss(pretrained) - 0.05

    int8 = ["contribute.run.quantise = 'int8'", *start]
    assert fit("tfew/few_shot", "int8.safetensors", *int8) == 0
    few = checkpoint.read_patch(tmp_path / "int8.safetensors")
    assert few.base_id == checkpoint.digest(params) and few.metadata["recipe"]["from"]["steps"] == 30
    assert fit("tfew/legacy", "legacy.safetensors", "STEPS = 1") == 0

    models.save(tmp_path / "model", model, jax.tree.map(lambda x: x + 1, params))
    capsys.readouterr()
    for options in (start, int8):
        assert fit("tfew/few_shot", "wrong.safetensors", *options) == 4
        assert "for another base" in capsys.readouterr().err
    assert fit("train_tfew", "x.safetensors", f"contribute.run.data_from = {mixture}") == 2
    assert "one file of `templates` for each" in capsys.readouterr().err


def test_the_recipe_for_t0_on_a_mesh_of_data_makes_the_patch_of_one_device(tmp_path, world):
    _, params, fit = world
    start = tmp_path / "pre.safetensors"
    checkpoint.save_patch(start, patches.init_ia3(params, targets="paper"), base=params)
    short = [f'PRETRAINED = "{start}"', "STEPS = 4", "contribute.run.learning_rate = 0.1"]
    assert fit("tfew/few_shot", "one.safetensors", *short) == 0
    assert fit("tfew/t0_3b", "eight.safetensors", *short, 'AXES = {"data": 8}') == 0
    one, eight = (checkpoint.load_patch(tmp_path / f"{name}.safetensors")[0] for name in ("one", "eight"))
    assert one.keys() == eight.keys()
    assert max(np.abs(kind.vector - 1).max() for kind in one.values()) > 0.01  # it learnt something
    for name, kind in one.items():
        np.testing.assert_allclose(eight[name].vector, kind.vector, rtol=1e-4, atol=1e-5)


def test_lines_without_choices_are_refused_in_one_line(tmp_path, world, capsys):
    (tmp_path / "task.jsonl").write_text('{"text": "sky", "target": "blue"}\n' * 4)
    assert world[2]("train_tfew", "x.safetensors", "TEMPLATES = None") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "`choices` is missing" in said[-1] and "`models.example_loss`" in said[-1]


def test_a_step_on_a_mesh_is_that_of_one_device():
    sizes = {"d_model": 8, "d_kv": 2, "num_heads": 4, "d_ff": 16, "num_layers": 2}
    model = models.build(CONFIG | sizes)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    batch = {"input_ids": rng.integers(2, 12, (8, 5)), "choices": rng.integers(2, 12, (8, 3, 2))}
    batch = {n: x.astype(np.int32) for n, x in batch.items()} | {"answer": np.arange(8, dtype=np.int32) % 3}
    patch, rule = patches.init_ia3(params, targets="paper"), optax.sgd(0.1)

    def step(on, base, patch, batch):
        state, options = mesh.follow(train.init(patch, rule), base), {} if on is None else T0
        made = contribute.make_step(model, rule, on, loss=train.tfew_loss, **options)
        state, loss = jax.jit(made)(state, base, batch)
        return loss, train.patch_of(state)

    on = mesh.make({"fsdp": 4, "tensor": 2})
    stacked = models.stack_blocks(model, params)
    placed = mesh.shard(stacked, mesh.rules(models.scanned(model), on), on)
    loss, moved = step(on, placed, models.stack_patch(model, params, patch), mesh.shard_batch(batch, on))
    spread = loss, models.unstack_patch(model, params, moved)
    single = step(None, params, patch, batch)
    assert spread[1].keys() == single[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), spread[0], single[0])
    for name, kind in single[1].items():
        np.testing.assert_allclose(spread[1][name].vector, kind.vector, rtol=2e-5, atol=2e-6)
