"""What every test runs under: eight fake CPU devices, strict dtypes and ranks, warnings as errors."""

import contextlib
import os
import tempfile

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The older of jax 0.10's two code generators compiles twice as fast; newer ones have one.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *["--xla_cpu_use_fusion_emitters=false"] * (jaxlib.version.__version_info__[:2] == (0, 10)),
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling is what costs. Many tests make functions anew whose programs are the same: those are compiled
# once by each worker. It writes the folder itself, so no other process can meet half a file.
CACHE = tempfile.TemporaryDirectory(prefix="fishjax_tests_")
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# derandomize: the same examples on every machine; `make soak` looks at many more, at random.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run the `soak` tests too (an hour)")


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: an hour long; run only with --soak")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        skip = pytest.mark.skip(reason="only with --soak")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def unoptimised(config):
    """Compile without LLVM's optimisations, and leave none of these programs to other tests.

    For what looks at programs or compares within a tolerance, not for bits; `make soak` optimises.
    """
    if config.getoption("--soak"):
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick(request):
    """Compile the programs of a module, from this test on, without optimisations."""
    with unoptimised(request.config):
        yield


@pytest.fixture
def quick_here(request):
    """Compile the programs of one test without optimisations."""
    with unoptimised(request.config):
        yield
