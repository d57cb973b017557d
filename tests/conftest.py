"""Strictness for every test: four simulated devices, no silent rank promotion; quick compilation; the shared data."""

import gc
import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile for longer than they compute; so do their commands
gc.set_threshold(50_000, 20, 100)  # tracing makes many small objects, and hardly any garbage
# Without its fusion emitters XLA compiles in a third of the time; the smoke form of the main job in .ci/run has them.
# Newer versions have nothing else, and end at a flag that they do not know.
QUICK = "--xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICK}"

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


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
    """Keeps what is compiled, for all workers and for the commands that tests start: many compile the same."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return place


MOST_MEMORY = 3 << 30
"""Bytes of a worker from which it forgets compiled programs between modules: hundreds of them take gigabytes."""


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    yield
    if not Path("/proc/self/statm").exists() or _resident() > MOST_MEMORY:
        jax.clear_caches()


LONGEST = (
    "integration/test_qat.py",
    "integration/test_notebooks.py",
    "ptq/test_fit.py",
    "integration/test_train.py",
    "integration/test_study.py",
    "test_doctests.py",
    "test_configs.py",
    "integration/test_diagnose.py",
    "interop/test_onnx_network.py",
    "interop/test_networks.py",
)
"""Files of a minute or so."""
LONG = ("integration", "ptq", "interop", "models")
"""Folders of long files."""


def pytest_collection_modifyitems(items):
    """The longest files first: a worker that takes a long one last keeps the other waiting."""
    place = {name: number for number, name in enumerate(LONGEST)}
    here = Path(__file__).parent

    def order(item):
        path = item.path.relative_to(here)
        return place.get(path.as_posix(), len(place)), path.parts[0] not in LONG

    items.sort(key=order)
