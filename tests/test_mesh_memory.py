"""The configuration for T0-3B on eight devices, compiled ahead of time and shallow: no weights are made."""

import math

import gin
import jax
import pytest


@pytest.fixture
def ratio(tmp_path):
    def of(*bindings):
        gin.clear_config()
        files = ["configs/t0_3b_memory.gin"]
        gin.parse_config_files_and_bindings(files, ["LAYERS = 2", *bindings])
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes of its own
            return gin.get_configurable("mesh_memory.run")(out=str(tmp_path / "memory.json"))

    yield of
    gin.clear_config()


def test_a_device_needs_its_share_of_parameters_and_examples(ratio, capsys):
    found = ratio()
    assert found["parameters"] == 4 * (
        2 * 32128 * 2048 + 2 * 2048 * (12 * 2048 + 6 * 5120 + 5) + 64 * 32 + 2 * 2048
    )
    assert math.isclose(found["arguments per device"], found["equal share"], rel_tol=0.01)
    assert found["ratio"] <= 1.25
    assert "each of 8 devices (fsdp=8)" in capsys.readouterr().out
