"""Every gin file names what exists: imports, functions and their arguments."""

import pathlib

import pytest

gin = pytest.importorskip("gin")
pytest.importorskip("tensorflow_datasets")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.gin")), ids=lambda p: p.stem)
def test_a_configuration_can_be_read(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # includes are from the project's root
    gin.clear_config()
    gin.parse_config_files_and_bindings([str(path)], [])
    assert gin.config_str()
    gin.clear_config()
