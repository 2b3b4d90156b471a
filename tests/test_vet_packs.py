"""Test packs: what they hold, what is refused, and text that a model encodes by itself."""

import json

import jax
import numpy as np
import pytest

from fishjax import vet
from fishjax.errors import UsageError
from tests.vet_world import context, finding, make


@pytest.fixture(scope="module")
def world():
    return make()


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
