"""Strictness for every test: four simulated devices, no silent rank promotion; quick compilation; the shared data."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile for longer than they compute


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real speech and models; the test is skipped where it is absent."""
    root = Path(__file__).parents[1]
    place = (root / os.environ.get("KMQ_SHARED", "../shared")).resolve()
    if not (place / "data").is_dir():
        pytest.skip(f"no real speech at {place} (set KMQ_SHARED)")
    return place


@pytest.fixture(autouse=True, scope="session")
def compiled(tmp_path_factory) -> Path:
    """Keeps what is compiled, for the commands that tests start too: many compile the same; each worker for itself."""
    place = tmp_path_factory.getbasetemp() / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return place


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs are of little use to other modules, and hundreds of them take gigabytes."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Folders of long tests first: a worker that takes a long file last keeps the other one waiting."""
    long = ("integration", "ptq")
    items.sort(key=lambda item: item.path.parent.name not in long)
