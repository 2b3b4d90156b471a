"""Generation and tokenizers: samples, padding, ends, text in and out, patches; and what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fishjax import checkpoint, cli, models, patches, tree
from fishjax.errors import FileFormatError, StructureError, UsageError
from tests.model_folders import FIXTURES, load

pytestmark = pytest.mark.usefixtures("quick")


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


def test_special_tokens_of_generation_config_count(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, 43]}))
    model, params = models.load(tmp_path / "m")
    expected = load_file(FIXTURES / "llama" / "expected.safetensors")
    batch = {n: expected[n] for n in ("input_ids", "attention_mask")}
    row = model.generate(params, batch, max_new_tokens=7)[0].tolist()
    assert row == [50, 43, 0, 0, 0, 0, 0] and models.until_end(row, model) == [50]


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
