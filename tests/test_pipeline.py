"""Pipelines against one device: outputs, patch gradients, what is on the wire, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishjax import leaves, mesh, models, patches
from fishjax.errors import StructureError, UsageError

pytestmark = pytest.mark.usefixtures("quick")

SIZE = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BERT = {"model_type": "bert", "max_position_embeddings": 8, "architectures": ["BertForMaskedLM"], **SIZE}
LLAMA = {"model_type": "llama", "num_key_value_heads": 1, **SIZE}
T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2}
BLOOM = {"model_type": "bloom", "vocab_size": 40, "hidden_size": 32, "n_head": 2}
DIGITS = {"model_type": "fishjax_digits", "hidden_size": 32, "intermediate_size": 48}
WIDE = 128  # entries that share a scale on the wire
IDS = np.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9, 3]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def built(config, layers):
    name = {"t5": "num_layers", "bloom": "n_layer"}.get(config["model_type"], "num_hidden_layers")
    model = models.build({**config, name: layers})
    noise = lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32)
    return model, jax.tree.map(noise, model.init(jax.random.key(0)))


def patched(params, sparse):
    """(IA)^3 in every block, LoRA on one leaf, and new values of few entries of another."""
    patch = patches.init_ia3(params, targets="paper")
    patch |= patches.init_lora(jax.random.key(1), params, rank=2, targets=[sparse.replace("0", "1")])
    patch = jax.tree.map(lambda x: x + 0.05, patch)
    return {**patch, sparse: patches.Sparse(jnp.array([2, 7, 30]), jnp.array([0.3, -0.2, 0.1]))}


def both(apply, patch):
    """Logits, and the gradient of a loss in the patch."""
    trainable, fixed = patches.partition(patch)

    def loss(trainable):
        logits = apply(patches.combine(trainable, fixed))
        return jnp.mean(jnp.sin(logits)), logits

    gradient, logits = jax.grad(loss, has_aux=True)(trainable)
    return logits, gradient


def both_alone(model, params, batch, patch):
    """The same of one device, in one program; weights are arguments, so that none is folded as a constant."""
    apply = lambda params: lambda patch: patches.unfolded(model.apply)(params, patch, batch)
    return jax.jit(lambda params, patch: both(apply(params), patch))(params, patch)


def apart(a, b):
    """The relative distance of two trees, in total norm."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(t))]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def bert():
    """An encoder of four blocks, a patch, and what one device makes of them."""
    model, params = built({**BERT, "hidden_size": WIDE}, 4)
    patch = patched(params, "bert.encoder.layer.0.intermediate.dense.weight")
    return model, params, patch, both_alone(model, params, BATCH, patch)


def test_unequal_stages_are_one_device(bert):
    model, params, patch, want = bert
    line = mesh.staged(model, params, BATCH, [1, 2, 1], micro=2)
    logits, gradient = both(lambda patch: line.apply(line.params, BATCH, patch), patch)
    assert apart(logits, want[0]) < 1e-5 and apart(gradient, want[1]) < 1e-5
    for i, stage in enumerate(line.params):
        assert {x.devices().pop() for x in jax.tree.leaves(stage)} == {jax.devices()[i]}


def test_ten_blocks_in_stages_of_5_2_1_2():
    model, params = built(DIGITS, 10)
    batch = {"image": np.random.default_rng(0).random((4, 8, 8), np.float32)}
    patch = jax.tree.map(lambda x: x + 0.05, patches.init_ia3(params, targets="paper"))
    want = both_alone(model, params, batch, patch)
    for wire, most in (("float", 1e-5), ("int8", 0.02)):
        line = mesh.staged(model, params, batch, [5, 2, 1, 2], wire=wire)
        got = both(lambda patch, line=line: line.apply(line.params, batch, patch), patch)
        assert apart(got[0], want[0]) < most and apart(got[1], want[1]) < most
    assert apart(got[1], want[1]) > 1e-5  # int8 was on the wire
    assert [len(jax.tree.leaves(p)) for p in line.params] == [5 * 16 + 3, 2 * 16, 16, 2 * 16 + 4]


def test_equal_stages_are_one_device(bert):
    model, params, patch, want = bert
    line = mesh.pipelined(model, params, BATCH, mesh.make({"stage": 2, "data": 2}), micro=2)
    logits, gradient = both(lambda patch: line.apply(line.params, BATCH, patch), patch)
    assert apart(logits, want[0]) < 1e-5 and apart(gradient, want[1]) < 1e-5
    leaf = line.params["blocks"]["intermediate"]["dense"]["weight"]
    assert leaf.shape == (4, 48, WIDE) and leaf.addressable_shards[0].data.shape == (2, 48, WIDE)


def test_an_int8_boundary_sends_a_quarter_of_the_bytes_both_ways(bert):
    model, params, patch, want = bert
    trainable, fixed = patches.partition(patch)
    sent, entries = {}, 2 * 4 * WIDE  # of a micro-batch; no patch has so many, nor so few as it has scales
    for wire in ("float", "int8"):
        line = mesh.pipelined(model, params, BATCH, mesh.make({"stage": 2}), micro=2, wire=wire)

        def loss(trainable, line=line):
            return jnp.mean(jnp.sin(line.apply(line.params, BATCH, patches.combine(trainable, fixed))))

        program = jax.jit(jax.grad(loss)).lower(trainable).compile()
        moved = re.findall(r"= (f32|s8)\[([\d,]+)\]\S* collective-permute\(", program.as_text())
        sizes = [(t, int(np.prod([int(n) for n in s.split(",")]))) for t, s in moved]
        sent[wire] = [found for found in sizes if found[1] in (entries, entries // 128)]
    # From stage to stage inside the loops over micro-batches, then from the last one to all; and back.
    assert sent["float"] == [("f32", entries)] * 4
    assert sorted(sent["int8"]) == [("f32", entries // 128)] * 4 + [("s8", entries)] * 4
    bytes_ = {w: sum({"f32": 4, "s8": 1}[t] * n for t, n in sent[w]) for w in sent}
    assert bytes_["int8"] < 0.26 * bytes_["float"]
    error = apart(program(trainable), want[1])
    assert 1e-5 < error < 0.02


def test_quantised_weights_go_through_both_pipelines():
    model, params = built(BLOOM, 2)
    params = leaves.quantise(params, "nf4")
    want = model.apply(params, BATCH)
    line = mesh.staged(model, params, BATCH, [1, 1])
    assert apart(line.apply(line.params, BATCH), want) < 1e-5
    line = mesh.pipelined(model, params, BATCH, mesh.make({"stage": 2}), micro=2)
    assert apart(line.apply(line.params, BATCH), want) < 1e-5


def test_encoder_and_decoder_in_unequal_stages():
    model, params = built(T5, 2)
    batch = {**BATCH, "labels": IDS[:, :3]}
    patch = jax.tree.map(lambda x: x + 0.05, patches.init_ia3(params, targets="paper"))
    want = both_alone(model, params, batch, patch)
    for wire, most in (("float", 1e-5), ("int8", 0.02)):
        line = mesh.staged(model, params, batch, [1, 3, 1], wire=wire)  # two, a norm, two
        got = both(lambda patch, line=line: line.apply(line.params, batch, patch), patch)
        assert apart(got[0], want[0]) < most and apart(got[1], want[1]) < most
    assert apart(got[1], want[1]) > 1e-5  # int8 was on the wire
    # Only hidden states are rounded, never the tables of relative positions.
    carry = jax.eval_shape(model.embed, params, batch)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(carry)[0]]
    moves = mesh.stages(model, params, batch, [1, 3, 1])[0].moves
    assert [p for p, m in zip(paths, moves) if m] == ["['encoder']", "['x']"]
    with pytest.raises(UsageError, match=r"5 blocks.*staged"):
        mesh.pipelined(model, params, batch, mesh.make({"stage": 2}))
    with pytest.raises(StructureError, match="no_such"):
        line.apply(line.params, batch, {"no_such": patches.Dense(jnp.ones(1))})


def test_wrong_arguments_end_at_once(bert):
    model, params, *_ = bert
    two = mesh.make({"stage": 2})
    windows = models.build({**LLAMA, "model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 2,
                            "layer_types": ["sliding_attention", "full_attention"]})  # fmt: skip
    for call, text in (
        (lambda: mesh.staged(model, params, BATCH, [2, 1]), "4 blocks; got"),
        (lambda: mesh.staged(model, params, BATCH, [4, 0]), "at least 1"),
        (
            lambda: mesh.staged(model, params, BATCH, [2, 2], devices=jax.devices()[:1]),
            "2 stages.*there are 1",
        ),
        (lambda: mesh.staged(model, params, BATCH, [2, 2], wire="int4"), "`wire`"),
        (lambda: mesh.pipelined(model, params, BATCH, mesh.make({"data": 2})), "`stage`"),
        (
            lambda: mesh.pipelined(model, params, BATCH, mesh.make({"stage": 3})),
            "3 stages do not divide the 4",
        ),
        (lambda: mesh.pipelined(windows, windows.init(jax.random.key(0)), BATCH, two), "differ"),
        (lambda: mesh.make({"stage": 16}), "needs 16 devices"),
    ):
        with pytest.raises(UsageError, match=text):
            call()
    for line in (
        mesh.staged(model, params, BATCH, [2, 2], micro=3),
        mesh.pipelined(model, params, BATCH, two, micro=3),
    ):
        with pytest.raises(UsageError, match=r"`micro`.*\[4\]; got 3"):
            line.apply(line.params, BATCH)
