"""Loading, losses, generation and tokenizers of models; and what a bad folder is told."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fishjax import checkpoint, cli, models, patches, tree
from fishjax.errors import FileFormatError, FishjaxError, StructureError, UsageError

pytestmark = pytest.mark.usefixtures("quick")

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"


def load(case):
    model, params = models.load(FIXTURES / case)
    return model, params, load_file(FIXTURES / case / "expected.safetensors")


def log_p(logits, labels):
    """The sum of log p over labels that are not -100, in float64."""
    logits = np.asarray(logits, np.float64)
    norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0] - norm
    return np.where(labels >= 0, picked, 0).reshape(len(labels), -1).sum(1)


@pytest.mark.parametrize("case", ["t5_v1_0", "llama", "gpt2", "bert_classifier"])
def test_loss_of_one_example_is_minus_log_p_of_its_labels(case):
    model, params, expected = load(case)
    batch = {n: x for n, x in expected.items() if n not in ("logits", "greedy")}
    ids, mask, logits = batch["input_ids"], batch["attention_mask"], expected["logits"]
    if case == "t5_v1_0":
        wanted = log_p(logits, batch["labels"])
    elif case == "bert_classifier":
        batch["labels"] = np.array([2, 0], np.int32)
        wanted = log_p(logits, batch["labels"])
    else:
        wanted = log_p(logits[:, :-1], np.where(mask[:, 1:], ids[:, 1:], -100))
    losses = jax.jit(jax.vmap(models.example_loss(model), (None, 0)))(params, batch)
    np.testing.assert_allclose(losses, -wanted, rtol=1e-5)


def test_labels_of_a_causal_model_that_say_what_counts():
    model, params, expected = load("llama")
    ids = expected["input_ids"][:1]
    labels = np.where(np.arange(ids.shape[1]) < 5, -100, ids)
    loss = models.example_loss(model)(params, {"input_ids": ids[0], "labels": labels[0]})
    np.testing.assert_allclose(loss, -log_p(expected["logits"][:1, :-1], labels[:, 1:])[0], rtol=1e-5)
    mask = model.token_mask({"input_ids": jnp.asarray(ids[0]), "labels": jnp.asarray(labels[0])})
    assert mask.tolist() == [False] * 4 + [True] * 4 + [False]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_head_that_labels_tokens(family, tmp_path):
    """Against transformers' hidden states through a linear layer; an old file has a pooler too."""
    shutil.copytree(FIXTURES / family, tmp_path / "m")
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((3, 24), 3))

    def change(tensors):
        named = {f"{family}.{n}": tensors.pop(n) for n in list(tensors)}
        tensors |= {n: x for n, x in named.items() if family == "bert" or "pooler" not in n}
        tensors |= {"classifier.weight": weight, "classifier.bias": bias}

    edit_tensors(tmp_path / "m", change)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text()) | {"id2label": {"0": "O", "1": "B", "2": "I"}}
    config["architectures"] = ["BertForTokenClassification"] if family == "bert" else None
    path.write_text(json.dumps(config))
    model, params = models.load(tmp_path / "m")
    expected = load_file(FIXTURES / family / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask", "token_type_ids") if n in expected}
    wanted = expected["logits"] @ weight.T + bias
    batch["labels"] = np.where(batch["attention_mask"] > 0, batch["input_ids"] % 4, 3).astype(np.int32)
    batch["labels"][batch["labels"] == 3] = -100
    loss = models.example_loss(model)
    logits, losses = jax.jit(lambda p, b: (model.apply(p, b), jax.vmap(loss, (None, 0))(p, b)))(params, batch)
    keep = batch["attention_mask"] > 0
    np.testing.assert_allclose(np.asarray(logits)[keep], wanted[keep], atol=1e-4)
    np.testing.assert_allclose(losses, -log_p(wanted, batch["labels"]), rtol=1e-5)
    if family == "roberta":
        fresh = models.build(config | {"architectures": ["RobertaForTokenClassification"]})
        tree.check_same(jax.eval_shape(fresh.init, jax.random.key(0)), params, ("fresh", "file"))


def test_a_sequence_is_not_classified_without_its_pooler(tmp_path):
    shutil.copytree(FIXTURES / "bert_classifier", tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: [t.pop(n) for n in list(t) if "pooler" in n])
    with pytest.raises(StructureError, match=r"missing: `bert\.pooler\.dense"):
        models.load(tmp_path / "m")


@pytest.mark.parametrize("change", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_heads_that_do_not_choose_a_class_have_no_loss(change):
    config = json.loads((FIXTURES / "bert_classifier" / "config.json").read_text())
    model = models.build({n: x for n, x in config.items() if "label" not in n} | change)
    with pytest.raises(UsageError, match="does not choose"):
        models.example_loss(model)


def test_a_bare_encoder_has_no_loss():
    model, _, _ = load("roberta")
    with pytest.raises(UsageError, match="no head"):
        models.example_loss(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["t5_v1_1", "gemma2"])
def test_sampling_with_a_cache_is_sampling_without(case):
    model, params, expected = load(case)
    model = models.build({**model.config, "eos_token_id": None}, tree.names(params))
    batch = {n: expected[n] for n in ("input_ids", "attention_mask")}
    key, steps = jax.random.key(3), 6
    got = model.generate(params, batch, max_new_tokens=steps, temperature=0.7, key=key)
    apply = jax.jit(model.apply)
    for row in range(2):
        prompt = batch["input_ids"][row][batch["attention_mask"][row] > 0].tolist()
        name = "decoder_input_ids" if case == "t5_v1_1" else "input_ids"
        sequence = [0] if case == "t5_v1_1" else prompt
        for step in range(steps):
            # Padded to one length, so that one compilation serves all steps.
            ids = sequence + [0] * (20 - len(sequence))
            fed = {"input_ids": [prompt], name: [ids]}
            logits = apply(params, {n: jnp.array(x) for n, x in fed.items()})[0, len(sequence) - 1]
            both = jnp.stack([logits, logits]) / 0.7  # the draw of a row depends on the shape of the batch
            sequence = [*sequence, int(jax.random.categorical(jax.random.fold_in(key, step), both)[row])]
        assert got[row].tolist() == sequence[-steps:]


def test_padding_on_the_left_and_on_the_right_generate_the_same():
    model, params, expected = load("bloom")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    left = [np.stack([np.roll(row, 9 - m.sum()) for row, m in zip(x, mask)]) for x in (ids, mask)]
    got = model.generate(params, {"input_ids": left[0], "attention_mask": left[1]}, max_new_tokens=7)
    np.testing.assert_array_equal(got, expected["greedy"])


def test_arguments_of_generate_are_checked():
    model, params, expected = load("gpt2")
    batch = {"input_ids": expected["input_ids"]}
    for options in ({"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": 1.0}, {"max_new_tokens": 99}):
        with pytest.raises(UsageError):
            model.generate(params, batch, **options)
    assert load("bert")[0].generate is None


def test_dtype_casts_and_stays():
    model, params = models.load(FIXTURES / "qwen3", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    expected = load_file(FIXTURES / "qwen3" / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask")}
    logits = model.apply(params, batch)
    assert logits.dtype == jnp.bfloat16
    mask = batch["attention_mask"] > 0
    error = np.abs(np.asarray(logits, np.float32) - expected["logits"])[mask]
    assert 1e-4 < error.max() < 0.1 * np.abs(expected["logits"]).max()


def test_float64_stays_float64(x64):
    model, params = models.load(FIXTURES / "t5_v1_1", dtype=jnp.float64)
    expected = load_file(FIXTURES / "t5_v1_1" / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask", "labels")}
    logits = jax.jit(model.apply)(params, batch)
    assert logits.dtype == jnp.float64
    keep = batch["labels"] >= 0
    np.testing.assert_allclose(logits[keep], expected["logits"][keep], atol=1e-4)


def test_init_has_the_names_and_shapes_of_the_file():
    for case in ("t5_v1_1", "roberta_classifier", "bloom", "gemma2", "gpt2"):
        model, params, _ = load(case)
        fresh = jax.eval_shape(model.init, jax.random.key(0))
        tree.check_same(fresh, params, (case, "file"))
    fresh = model.init(jax.random.key(0))["transformer"]["h"]["0"]
    assert (
        float(fresh["ln_1"]["weight"].min()) == 1
        and 0.01 < float(fresh["mlp"]["c_fc"]["weight"].std()) < 0.03
    )


def test_special_tokens_of_generation_config_count(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, 43]}))
    model, params = models.load(tmp_path / "m")
    expected = load_file(FIXTURES / "llama" / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask")}
    row = model.generate(params, batch, max_new_tokens=7)[0].tolist()
    assert row == [50, 43, 0, 0, 0, 0, 0] and models.until_end(row, model) == [50]


# Bad folders: each gets one clear error, and nothing is half loaded.


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "t5_v1_1", tmp_path / "m")
    return tmp_path / "m"


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


WO = "decoder.block.1.layer.2.DenseReluDense.wo.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(WO), f"missing: `{WO}`"),
        (lambda t: t.update({"extra.weight": t[WO]}), "not of this model: `extra.weight`"),
        (lambda t: t.update({WO: np.ascontiguousarray(t[WO].T)}), rf"`{WO}` \[28, 20\] where \[20, 28\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(StructureError, match=message) as error:
        models.load(folder)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("{", FileFormatError, "not JSON"),
        ("[" * 100_000, FileFormatError, "not JSON"),
        ("[]", FileFormatError, "JSON object"),
        ("{}", UsageError, "`t5`, `bert`"),
        ('{"model_type": "mamba"}', UsageError, "`mamba`"),
        ('{"model_type": ["t5"]}', UsageError, "model_type"),
        ('{"model_type": "t5"}', FileFormatError, "d_model"),
    ],
)
def test_configs_that_say_nothing_are_refused(folder, text, error, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(error, match=message) as told:
        models.load(folder)
    assert str(folder / "config.json") in str(told.value)


@pytest.mark.parametrize(
    "case, change, error",
    [
        ("t5_v1_1", {"num_layers": 2}, StructureError),
        ("t5_v1_1", {"num_layers": 2_000_000_000}, FileFormatError),
        ("t5_v1_1", {"num_layers": "3"}, FileFormatError),
        ("t5_v1_1", {"feed_forward_proj": "gated-step"}, UsageError),
        ("bert", {"num_attention_heads": 5}, StructureError),
        ("bert", {"position_embedding_type": "relative_key"}, UsageError),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, UsageError),
        ("llama", {"tie_word_embeddings": True}, None),
        ("llama", {"num_key_value_heads": 3}, StructureError),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, UsageError),
    ],
)
def test_configs_that_do_not_fit_the_file_are_refused(tmp_path, case, change, error):
    shutil.copytree(FIXTURES / case, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if error is None:  # the file has an output layer of its own, whatever the config says
        models.load(tmp_path / "m")
        return
    with pytest.raises(error):
        models.load(tmp_path / "m")


@pytest.mark.parametrize("case", ["t5_v1_0", "bert_classifier", "gemma2"])
def test_entries_of_a_wrong_kind_are_told_and_never_crash(case, tmp_path):
    shutil.copytree(FIXTURES / case, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    junk = [(n, x) for n in config for x in (None, "x", [], {}, 1.5, 10_000)]
    refused = 0
    for i in np.random.default_rng(0).choice(len(junk), 25, replace=False):
        path.write_text(json.dumps(config | dict([junk[i]])))
        try:
            models.load(tmp_path / "m")
        except FishjaxError:
            refused += 1
    assert refused >= 4


def test_a_depth_that_the_file_does_not_have_is_found_before_anything_is_built(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10_000}))
    with pytest.raises(StructureError, match=r"model\.layers\.3` and 9996 more blocks"):
        models.load(tmp_path / "m")


def test_a_missing_folder_or_file_is_said_to_be_missing(folder):
    with pytest.raises(UsageError, match="nothing is downloaded"):
        models.load("google/flan-t5-small")
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(UsageError, match=r"no config\.json"):
        models.load(folder)
    (folder / "other.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model"):
        models.load(folder)


def test_pickles_are_not_read_whatever_they_are_called(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(FileFormatError, match="pickle"):
        models.load(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin"):
        models.load(folder)


def test_shards_of_another_revision_are_found(folder):
    params = checkpoint.load_params(folder)
    (folder / "model.safetensors").unlink()
    checkpoint.save_params(folder, params, shard_bytes=20_000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    assert tree.names(models.load(folder)[1]) == tree.names(params)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())  # swapped
    with pytest.raises(FileFormatError, match="index"):
        models.load(folder)
    first.write_bytes(kept[:-4])  # cut
    with pytest.raises(FileFormatError):
        models.load(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        models.load(folder)


def word_tokenizer(path, words):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    tokenizer = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_text_goes_through_the_tokenizer_of_the_folder(tmp_path, capsys):
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    words = [f"w{i}" for i in range(67)]
    word_tokenizer(tmp_path / "m" / "tokenizer.json", words)
    model, params = models.load(tmp_path / "m")
    tokenizer = models.load_tokenizer(tmp_path / "m", model)
    batch = models.encode(tokenizer, ["w4 w5 w6", "w7"], model)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    ids = models.until_end(model.generate(params, batch, max_new_tokens=5)[0].tolist(), model)
    args = ["generate", "--model", str(tmp_path / "m"), "--max-new-tokens", "5", "w4 w5 w6", "w7"]
    assert cli.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " ".join(f"w{i}" for i in ids) and len(lines) == 2
    assert cli.main([*args[:5], "--ids", "--json", "4 5 6"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == ids


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    model, _ = models.load(tmp_path / "m")
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        models.load_tokenizer(tmp_path / "m", model)
    word_tokenizer(tmp_path / "m" / "tokenizer.json", [f"w{i}" for i in range(68)])
    with pytest.raises(StructureError, match="ids up to 67"):
        models.load_tokenizer(tmp_path / "m", model)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match="no tokenizer"):
        models.load_tokenizer(tmp_path / "m", model)
    with pytest.raises(UsageError, match="at least one token"):
        models.pad([[]], model)
    with pytest.raises(UsageError, match=r"\[0, 67\)"):
        models.pad([[67]], model)


def test_generate_with_a_tokenizer_that_does_not_fit_exits_as_stated(tmp_path, capsys):
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")

    def run():
        code = cli.main(["generate", "--model", str(tmp_path / "m"), "--max-new-tokens", "2", "w4 w5"])
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.splitlines()) == 1
        return code, shown.err

    code, said = run()
    assert code == 2 and "no tokenizer.json" in said
    word_tokenizer(tmp_path / "m" / "tokenizer.json", [f"w{i}" for i in range(68)])
    code, said = run()
    assert code == 4 and "ids up to 67" in said and "has 67 rows" in said and "tokenizer.json" in said
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    code, said = run()
    assert code == 3 and "is no tokenizer" in said


def test_generate_takes_patches_of_the_right_base_only(tmp_path, capsys):
    base = FIXTURES / "llama3"
    model, params = models.load(base)
    patch = checkpoint.load_peft(base / "adapters/ia3", model, params)
    checkpoint.save_patch(tmp_path / "p", patch, base=params)

    def run(*more, model=base):
        code = cli.main(
            ["generate", "--model", str(model), "--ids", "--max-new-tokens", "6", "5 9 11", *more]
        )
        return code, capsys.readouterr()

    batch = models.pad([[5, 9, 11]], model)
    ids = model.generate(patches.apply(params, patch), batch, max_new_tokens=6)[0].tolist()
    wanted = " ".join(map(str, models.until_end(ids, model)))
    plain = model.generate(params, batch, max_new_tokens=6)[0].tolist()
    assert plain != ids
    for patched in (str(base / "adapters/ia3"), str(tmp_path / "p")):
        code, shown = run("--patch", patched)
        assert code == 0 and shown.out == wanted + "\n"
    code, shown = run("--patch", str(tmp_path / "p"), model=FIXTURES / "llama")
    assert code == 4 and "another base" in shown.err
    assert run(model=FIXTURES / "bert")[0] == 2


def test_convert_goes_there_and_back(tmp_path, capsys):
    base, adapter = str(FIXTURES / "llama3"), FIXTURES / "llama3" / "adapters" / "ia3"
    out = lambda name: str(tmp_path / name)
    assert cli.main(["convert", base, out("orbax"), "--to", "orbax"]) == 0
    assert cli.main(["convert", out("orbax"), out("hf"), "--to", "hf"]) == 0
    assert checkpoint.digest(checkpoint.load_params(out("hf"))) == checkpoint.digest(
        checkpoint.load_params(base)
    )
    assert (
        models.load(out("hf"))[0].config == models.load(out("orbax"))[0].config == models.load(base)[0].config
    )
    assert cli.main(["convert", base, out("half"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    assert {x.dtype.name for x in tree.flatten(checkpoint.load_params(out("half"))).values()} == {"bfloat16"}
    said = [json.loads(pathlib.Path(p, "config.json").read_text()) for p in (base, out("half"))]
    assert said[1] == said[0] | {"dtype": "bfloat16"} != said[0]
    assert cli.main(["convert", str(adapter), out("p"), "--to", "patch", "--model", base]) == 0
    assert cli.main(["convert", out("p"), out("a"), "--to", "peft", "--model", base]) == 0
    theirs, ours = (load_file(f"{p}/adapter_model.safetensors") for p in (adapter, out("a")))
    assert theirs.keys() == ours.keys() and all((theirs[n] == ours[n]).all() for n in ours)
    assert cli.main(["convert", out("p"), out("b"), "--to", "peft", "--model", str(FIXTURES / "llama")]) == 4
    assert cli.main(["convert", base, out("hf"), "--to", "hf"]) == 2
    assert cli.main(["convert", base, out("c"), "--to", "peft"]) == 2
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_tensors_go_straight_to_where_they_are_wanted(layout, tmp_path):
    checkpoint.save_params(tmp_path / "m", checkpoint.load_params(FIXTURES / "bloom"), layout=layout)
    shutil.copy(FIXTURES / "bloom" / "config.json", tmp_path / "m")
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    _, params = models.load(tmp_path / "m", shardings={name: split})
    flat, (_, plain) = tree.flatten(params), models.load(FIXTURES / "bloom")
    assert flat[name].sharding == split and len(flat[name].addressable_shards) == 8
    assert sum(len(x.sharding.device_set) == 8 for x in flat.values()) == 1
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    _, half = models.load(tmp_path / "m", shardings={name: split}, dtype=jnp.bfloat16)
    assert tree.flatten(half)[name].sharding == split
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda h, x: np.testing.assert_array_equal(h, x.astype(jnp.bfloat16)), half, plain)
    odd = "transformer.word_embeddings.weight"  # 67 rows do not go on 8 devices
    with pytest.raises(ValueError, match="8"):
        models.load(tmp_path / "m", shardings={odd: split})


@pytest.mark.parametrize("kind", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_weights_in_fp8_load_exactly_and_round_trip(kind, layout, tmp_path):
    fp8 = jax.tree.map(lambda x: x.astype(kind), checkpoint.load_params(FIXTURES / "llama"))
    checkpoint.save_params(tmp_path / "m", fp8, layout=layout)
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path / "m")
    model, narrow = models.load(tmp_path / "m")
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(kind)}
    _, wide = models.load(tmp_path / "m", dtype=jnp.float32)
    exact = jax.tree.map(lambda x: x.astype(np.float64), fp8)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.float64, wide), exact)
    logits = model.apply(wide, {"input_ids": jnp.array([[5, 9, 11]])})
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    wider = ["convert", str(tmp_path / "m"), str(tmp_path / "wide"), "--to", "hf", "--dtype", "float32"]
    assert cli.main(wider) == 0
    assert checkpoint.digest(checkpoint.load_params(tmp_path / "wide")) == checkpoint.digest(wide)
    checkpoint.save_params(tmp_path / "again", narrow, layout=layout)
    assert checkpoint.digest(checkpoint.load_params(tmp_path / "again")) == checkpoint.digest(fp8)


def test_donating_loaded_parameters_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    _, params = models.load(folder)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    assert (folder / "model.safetensors").read_bytes() == before
    _, again = models.load(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, again)


def test_a_t5_folder_with_only_a_spiece_model_has_a_tokenizer(tmp_path):
    expected = json.loads((FIXTURES / "spiece" / "expected.json").read_text())
    model = models.build(json.loads((FIXTURES / "t5_v1_0" / "config.json").read_text()) | {"vocab_size": 600})
    tokenizer = models.load_tokenizer(FIXTURES / "spiece", model)
    for row in expected:
        ids = tokenizer.encode(row["text"]).ids
        assert ids == [*row["ids"], 1]  # T5 ends every text
        if 2 not in ids:  # sentencepiece writes unknown pieces as a mark
            assert tokenizer.decode(ids) == row["decoded"]
    size = tokenizer.get_vocab_size()
    assert tokenizer.encode("<extra_id_0>").ids == [size - 1, 1]
    for data in (b"", b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 40, b"\x80\x04K\x01."):
        (tmp_path / "spiece.model").write_bytes(data)
        with pytest.raises(FileFormatError, match="spiece"):
            models.load_tokenizer(tmp_path, model)


@pytest.mark.parametrize("case", ["bert_masked", "roberta_masked"])
def test_old_names_and_left_over_heads_of_pre_training_load(case, tmp_path):
    shutil.copytree(FIXTURES / case, tmp_path / "m")
    width = 24

    def age(tensors):
        for name in list(tensors):
            if "LayerNorm." in name and case == "bert_masked":
                old = {"weight": "gamma", "bias": "beta"}[name.rpartition(".")[2]]
                tensors[f"{name.rpartition('.')[0]}.{old}"] = tensors.pop(name)
        word = tensors["bert.embeddings.word_embeddings.weight" if case == "bert_masked" else WORD]
        if case == "bert_masked":
            tensors["cls.seq_relationship.weight"] = np.ones((2, width), np.float32)
            tensors["cls.seq_relationship.bias"] = np.ones(2, np.float32)
            tensors["bert.pooler.dense.weight"] = np.ones((width, width), np.float32)
            tensors["bert.pooler.dense.bias"] = np.ones(width, np.float32)
            tensors["cls.predictions.decoder.weight"] = word
        else:
            tensors["lm_head.decoder.weight"] = word
            tensors["roberta.embeddings.position_ids"] = np.arange(14)[None]

    edit_tensors(tmp_path / "m", age)
    model, params = models.load(tmp_path / "m")
    expected = load_file(FIXTURES / case / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask", "token_type_ids") if n in expected}
    logits, keep = jax.jit(model.apply)(params, batch), expected["attention_mask"] > 0
    np.testing.assert_allclose(logits[keep], expected["logits"][keep], atol=1e-4)
    batch["labels"] = np.where(np.arange(9)[None] == 2, batch["input_ids"], -100)
    losses = jax.jit(jax.vmap(models.example_loss(model), (None, 0)))(params, batch)
    np.testing.assert_allclose(losses, -log_p(expected["logits"], batch["labels"]), rtol=1e-5)


WORD = "roberta.embeddings.word_embeddings.weight"


# A bias of keys shifts all scores of a query alike, and a bare encoder's pooler is not used.
NO_GRADIENT = r"self\.key\.bias$|k_proj\.bias$"


@pytest.mark.parametrize(
    "case", ["t5_v1_0", "t5_v1_1", "bert_classifier", "roberta_masked", "llama3", "gemma2", "gpt2"]
)
def test_the_loss_is_differentiable_in_every_parameter(case):
    model, params, expected = load(case)
    example = {n: x[0] for n, x in expected.items() if n not in ("logits", "greedy")}
    if case == "bert_classifier":
        example["labels"] = np.int32(1)
    elif case == "roberta_masked":
        example["labels"] = example["input_ids"]
    gradients = tree.flatten(jax.jit(jax.grad(models.example_loss(model)))(params, example))
    for name, g in gradients.items():
        assert np.isfinite(g).all(), name
        assert re.search(NO_GRADIENT, name) or np.abs(g).max() > 1e-6, name


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_lead_out_of_a_folder_are_refused(folder, name, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match=f"{name}.*symbolic link"):
        models.load(folder)


def test_links_of_the_hub_cache_are_taken(folder, tmp_path, capsys):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    folder = folder.rename(tmp_path / "snapshots" / "abc")
    for i, name in enumerate(("config.json", "model.safetensors")):
        (folder / name).rename(tmp_path / "blobs" / str(i))
        (folder / name).symlink_to(pathlib.Path("../../blobs") / str(i))
    assert models.load(folder)[0].family == "t5"
    (tmp_path / "card").write_text("private")
    (folder / "README.md").symlink_to(tmp_path / "card")
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert "left out `README.md`" in capsys.readouterr().err
    models.load(tmp_path / "out")
