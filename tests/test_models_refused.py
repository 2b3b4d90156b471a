"""Bad folders: each gets one clear error, and nothing is half loaded."""

import json
import shutil

import numpy as np
import pytest

from fishjax import checkpoint, models, tree
from fishjax.errors import FileFormatError, FishjaxError, StructureError, UsageError
from tests.model_folders import FIXTURES, edit_tensors

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "t5_v1_1", tmp_path / "m")
    return tmp_path / "m"


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_lead_out_of_a_folder_are_refused(folder, name, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match=f"{name}.*symbolic link"):
        models.load(folder)
