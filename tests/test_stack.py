"""Sums of patches, and one patch for each example: against each alone, and without a copy of the weights."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fishjax import checkpoint, cli, leaves, models, patches, train, tree
from fishjax.errors import StructureError, UsageError
from tests.test_peft import FIXTURES

pytestmark = pytest.mark.usefixtures("quick")

D, F, V, L, T, B = 8, 12, 11, 3, 5, 6


def base(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, D), "up": (L, D, F), "bias": (L, F), "down": (L, F, D), "norm": (D,)}
    return {n: jnp.asarray(rng.normal(size=s) * 0.5, dtype) for n, s in shapes.items()}


def model(params, ids):
    """Tokens `[B, T]` -> logits `[B, T, V]`: a scan over layers under remat, the embedding tied."""
    x = jnp.take(params["embed"], ids, axis=0)

    @jax.checkpoint
    def layer(x, block):
        up, bias, down = block
        h = jnp.tanh(jnp.einsum("btd,df->btf", x, up) + bias[None, None])
        return x + jnp.einsum("btf,fd->btd", h, down), None

    x, _ = lax.scan(layer, x, (params["up"], params["bias"], params["down"]))
    return jnp.einsum("btd,vd->btv", x * params["norm"][None, None], params["embed"])


def adapters(dtype=jnp.float32):
    """(IA)^3 with its bias, LoRA of two ranks, both on other leaves, vectors replaced, and nothing."""
    key, params = jax.random.key(1), base(dtype)
    ia3 = patches.init_ia3(params, targets={"^up$": (0, 2), "^bias$": (0, 1)})
    ia3 |= patches.init_ia3(params, targets={"^down$": (0, 1)})
    lora = lambda i, rank, targets, alpha: patches.init_lora(
        jax.random.fold_in(key, i), params, rank=rank, targets=targets, alpha=alpha
    )
    both = lora(2, 2, {"^down$": (0, 1), "^embed$": 0}, 3.0) | patches.init_ia3(params, targets={"^up$": 1})
    made = [
        ia3,
        lora(0, 3, {"^up$": (0, 1), "^down$": (0, 1)}, 6.0),
        lora(1, 1, {"^up$": (0, 1)}, 1.0) | patches.init_dense(params, "norm"),
        {},
        both,
    ]
    return [moved(p, i) for i, p in enumerate(made)]


def moved(patch, seed):
    leaves, treedef = jax.tree.flatten(patch)
    keys = jax.random.split(jax.random.key(100 + seed), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, leaves)


IDS = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)
TASKS = [4, 0, -1, 1, 2, 0]


def close(a, b, share):
    np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())


@pytest.mark.parametrize(
    "dtype, share, rows",
    [
        (jnp.float32, 1e-6, 1),
        (jnp.float64, 1e-10, 2),
        pytest.param(jnp.float32, 1e-6, 5, marks=pytest.mark.slow),
    ],
)
def test_each_row_is_its_patch_alone(dtype, share, rows):
    with jax.enable_x64(dtype == jnp.float64):
        params, all_patches = base(dtype), adapters(dtype)
        stacked, run = patches.stack(all_patches), jax.jit(patches.unfolded(model))
        got = run(params, patches.select(stacked, TASKS), IDS)
        for i, task in enumerate(TASKS[:rows]):
            close(got[i], run(params, all_patches[task] if task >= 0 else {}, IDS[i : i + 1])[0], share)
        assert patches.unfolded_report(model)(params, patches.select(stacked, TASKS), IDS) == []


def test_rows_have_their_patches_over_weights_in_few_bits(x64):
    params, made = base(jnp.float64), adapters(jnp.float64)[:2]
    few = {n: leaves.quantised(x, "int8", name=n) if n in ("up", "down") else x for n, x in params.items()}
    rounded = {n: leaves.array(x) for n, x in few.items()}
    stacked, run = patches.stack(made), jax.jit(patches.unfolded(model))
    chosen = lambda stacked: patches.Selected(stacked, jnp.array([1, 0, -1, 1, 0, 0]))
    both = jax.value_and_grad(lambda s, w: jnp.sum(jnp.sin(run(w, chosen(s), IDS))), allow_int=True)
    assert all(np.abs(rounded[n] - params[n]).max() > 1e-4 for n in ("up", "down"))
    (loss, got), (want_loss, want) = jax.jit(both)(stacked, few), jax.jit(both)(stacked, rounded)
    close(loss, want_loss, 1e-12)
    floats = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    for x, y in zip(floats(got), floats(want), strict=True):
        close(x, y, 1e-10)


def test_the_weights_stay_unbatched_and_ids_do_not_compile_again():
    params, stacked = base(), patches.stack(adapters())
    count = 0

    def counted(params, ids):
        nonlocal count
        count += 1
        return model(params, ids)

    run = jax.jit(patches.unfolded(counted))
    first = run(params, patches.select(stacked, TASKS), IDS)
    again = run(params, patches.select(stacked, [0, 1, 2, 3, 4, -1]), IDS)
    assert count == 1 and run._cache_size() == 1
    np.testing.assert_array_equal(again[1] == first[1], False)

    def batched_weights(f, *args):
        text = jax.jit(f).lower(*args).compile().as_text()
        assert f"f32[{V},{D}]" in text
        sizes = "|".join(f"{L},{D},{F}|{D},{F}|{L},{F},{D}|{F},{D}|{V},{D}".split("|"))
        return re.findall(rf"f32\[(?:\d+,)?{B},(?:{sizes})\]", text)

    selected = patches.select(stacked, TASKS)
    loss = lambda stacked, params, ids: jnp.sum(
        run(params, patches.Selected(stacked, selected.task_ids), ids)
    )
    assert not batched_weights(jax.value_and_grad(loss), stacked, params, IDS)
    alone = jax.vmap(lambda s, ids: model(patches.apply(params, {"up": patches.Scale(s)}), ids[None]))
    assert batched_weights(alone, jnp.ones((B, L, 1, F)), IDS)  # the control: folded


def test_ids_out_of_range_are_refused_or_give_nan_and_are_never_clamped():
    params, stacked = base(), patches.stack(adapters())
    for odd in ([5, 0], [-2, 0], [2**40, 0]):
        with pytest.raises(UsageError, match=r"\[-1, 4\] with 5 patches"):
            patches.select(stacked, np.array(odd))
    for odd in ([0.5], [[0]], 0):
        with pytest.raises(UsageError, match="integers"):
            patches.select(stacked, odd)
    for not_stacked in (adapters()[:1], adapters()[0]):
        with pytest.raises(UsageError, match=r"`stacked` must be the result of `patches\.stack`; got"):
            patches.select(not_stacked, [0])
    traced = jax.jit(lambda ids: patches.unfolded(model)(params, patches.select(stacked, ids), IDS))
    got = np.asarray(traced(jnp.array([5, 0, -1, -2, 1, 99])))
    assert np.isnan(got).all(axis=(1, 2)).tolist() == [True, False, False, True, False, True]
    assert np.isfinite(got).all(axis=(1, 2)).tolist() == [False, True, True, False, True, False]


def test_gradients_reach_each_tasks_own_row_and_train_it(x64):
    """Two steps of momentum on all tasks at once are two steps on each, bit for bit but rounding."""
    params, all_patches = base(jnp.float64), adapters(jnp.float64)
    optimizer, targets = optax.sgd(0.1, momentum=0.9), np.random.default_rng(3).normal(size=(B, T, V))
    batch = {"ids": IDS, "y": targets}
    one = lambda params, e: jnp.sum(jnp.sin(model(params, e["ids"][None])[0] - e["y"]))

    def trained(start, step, batch):
        state, step = train.init(start, optimizer), jax.jit(step)
        for _ in range(2):
            state, _ = step(state, params, batch)
        return train.patch_of(state)

    mixed = train.make_mixed_step(one, optimizer)
    together = patches.unstack(
        trained(patches.stack(all_patches), mixed, {**batch, "task_ids": np.array(TASKS, np.int32)})
    )
    for i in (0, 1, 4):
        mine = np.array(TASKS) == i
        share = mine.sum() / B
        own = lambda params, e, share=share: share * one(params, e)
        alone = train.make_step(leaves.interpret(own), optimizer, apply=patches.unfold)
        want = trained(all_patches[i], alone, {n: x[mine] for n, x in batch.items()})
        jax.tree.map(lambda a, b: close(a, b, 1e-10), together[i], want)
    jax.tree.map(np.testing.assert_array_equal, together[3], all_patches[3])  # no example was its own
    with pytest.raises(StructureError, match="`task_ids`; got ids, y"):
        mixed(train.init(patches.stack(all_patches), optimizer), params, batch)


def test_unstacked_patches_are_those_that_were_stacked():
    again = patches.unstack(patches.stack(adapters()))
    jax.tree.map(np.testing.assert_array_equal, again, adapters())


def test_what_cannot_be_stacked_or_mapped_is_refused():
    params = base()
    with pytest.raises(UsageError, match="none"):
        patches.stack([])
    with pytest.raises(UsageError, match="`up` is changed by Dense"):
        patches.stack([patches.init_dense(params, "^up$")])
    stacked = patches.stack(adapters())
    selected = patches.select(stacked, TASKS)
    with pytest.raises(StructureError, match="6 task ids"):
        patches.unfolded(model)(params, selected, IDS[:2])
    with pytest.raises(StructureError, match="same for all"):
        patches.unfolded(lambda p, x: jnp.sum(model(p, x)))(params, selected, IDS)
    with pytest.raises(StructureError, match="leading axis; got"):
        patches.unfolded(lambda p, x: p["norm"])(params, selected, IDS)
    with pytest.raises(StructureError, match="`up`"):
        patches.unfolded(model)({**params, "up": params["down"]}, selected, IDS)
    with pytest.raises(UsageError, match="Selected"):
        patches.apply(params, selected)


def test_arguments_without_axes_are_shared_as_are_results():
    params, selected = base(), patches.select(patches.stack(adapters()), TASKS)

    def fn(params, ids, scale, *, mode):
        assert mode == "plain"
        return scale * model(params, ids), {"scale": 2 * scale}

    y, rest = patches.unfolded(fn)(params, selected, IDS, jnp.float32(2), mode="plain")
    close(y, 2 * patches.unfolded(model)(params, selected, IDS), 1e-6)
    assert rest["scale"].shape == () and rest["scale"] == 4


def test_sums_of_patches_form_no_weight(x64):
    params, all_patches = base(jnp.float64), adapters(jnp.float64)
    order = [all_patches[i] for i in (0, 1, 4, 0, 2)]
    run = patches.unfolded(model)
    assert patches.unfolded_report(model)(params, order, IDS) == []
    loss = lambda run: lambda order: jnp.sum(jnp.sin(run(params, order, IDS)))
    got = jax.jit(jax.value_and_grad(loss(run)))(order)
    want = jax.jit(jax.value_and_grad(loss(lambda p, o, x: model(patches.compose(p, o), x))))(order)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


def test_bfloat16_and_sharded_batches():
    params, stacked = base(jnp.bfloat16), patches.stack(adapters())
    ids, tasks = np.tile(IDS[:4], (2, 1)), np.array([0, 1, 2, 3, 4, -1, 0, 1])
    run = jax.jit(patches.unfolded(model))
    want = run(params, patches.select(stacked, tasks), ids)
    assert want.dtype == jnp.bfloat16
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    sharded = tree.map_named(
        lambda n, x: place(x, None, None, "model") if n == "up" else place(x, *[None] * x.ndim), params
    )
    selected = patches.Selected(stacked, place(jnp.asarray(tasks, jnp.int32), "data"))
    got = run(sharded, selected, place(jnp.asarray(ids), "data"))
    close(np.asarray(got, np.float32), np.asarray(want, np.float32), 2**-6)


def test_divided_weights_are_not_gathered():
    params, patch = base(), adapters()[0] | {"embed": adapters()[4]["embed"]}
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    where = {"up": (None, None, "model"), "bias": (None, "model"), "down": (None, "model", None)}
    place = lambda n, x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*where.get(n, ()))))
    loss = lambda patch, params: jnp.sum(jnp.sin(patches.unfolded(model)(params, patch, IDS)))
    trainable, fixed = patches.partition(patch)
    gradient = jax.jit(jax.grad(lambda t, params: loss(patches.combine(t, fixed), params)))
    divided = gradient.lower(trainable, tree.map_named(place, params)).compile()
    text = divided.as_text()
    assert f"f32[{D},{F // 2}]" in text or f"f32[{L},{D},{F // 2}]" in text
    moved = re.findall(r"= \(?(\w+\[[\d,]*\]).* (?:all-gather|all-to-all|collective-permute)\(", text)
    sizes = [int(np.prod([int(n) for n in re.findall(r"\d+", m.split("[")[1])])) for m in moved]
    assert max(sizes, default=0) < D * F // 2, moved
    got, want = divided(trainable, tree.map_named(place, params)), gradient(trainable, params)
    jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b), 1e-5), got, want)


def test_a_while_loop_keeps_the_factors(x64):
    params, patch = base(jnp.float64), adapters(jnp.float64)[1]

    def loop(params, x):
        body = lambda s: (s[0] + 1, jnp.tanh(s[1] @ params["up"][0] @ params["down"][0]))
        return lax.while_loop(lambda s: (s[0] < 3) & (jnp.sum(s[1] @ params["up"][1]) < 1e6), body, (0, x))[1]

    x = jnp.ones((2, D))
    close(patches.unfolded(loop)(params, patch, x), loop(patches.apply(params, patch), x), 1e-13)
    assert patches.unfolded_report(loop)(params, patch, x) == []


@pytest.mark.parametrize(
    "case, temperature", [("t5_v1_1", 0.0), pytest.param("bloom", 0.7, marks=pytest.mark.slow)]
)
def test_generate_runs_each_prompt_under_its_patch(case, temperature, key):
    model, params = models.load(FIXTURES / case)
    made = [checkpoint.load_peft(FIXTURES / case / "adapters" / n, model, params) for n in ("ia3", "lora")]
    batch = models.pad([[5, 9, 11, 3], [4, 8], [7, 3, 6]] * 2, model)
    tasks = [1, -1, 0, 0, 1, -1]
    options = {"max_new_tokens": 5, "temperature": temperature, "key": key}
    got = model.generate(params, batch, patch=patches.select(patches.stack(made), tasks), **options)
    alone = [model.generate(patches.apply(params, p), batch, **options) for p in (*made, {})]
    assert not np.array_equal(alone[0], alone[1]) and not np.array_equal(alone[0], alone[2])
    np.testing.assert_array_equal(got, [alone[t][i] for i, t in enumerate(tasks)])


def test_generate_takes_one_patch_for_each_prompt_from_the_command_line(tmp_path, capsys):
    base = FIXTURES / "bloom"
    model, params = models.load(base)
    ia3 = checkpoint.load_peft(base / "adapters/ia3", model, params)
    checkpoint.save_patch(tmp_path / "p", ia3, base=params)

    def run(*more):
        code = cli.main(
            ["generate", "--model", str(base), "--ids", "--json", "--max-new-tokens", "4", *map(str, more)]
        )
        shown = capsys.readouterr()
        return code, [json.loads(line)["ids"] for line in shown.out.splitlines()], shown.err

    each = [x for p in (tmp_path / "p", "none", base / "adapters/lora") for x in ("--patch", p)]
    prompts = ["5 9 11", "4 8 3", "7 3 6"]
    code, got, _ = run(*each, *prompts)
    assert code == 0
    one = run("--patch", tmp_path / "p", *prompts)[1]  # one patch: for all prompts
    lora = run("--patch", base / "adapters/lora", *prompts)[1]
    assert got == [one[0], run(*prompts)[1][1], lora[2]] and one[1:] != got[1:]
    code, _, error = run(*each, *prompts[:2])
    assert code == 2 and "3 patches do not go with 2 prompts" in error
