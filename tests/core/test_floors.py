"""Imports only go down the floors: read from the source, so that no module can slip past."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kmq_jax"

# Within a floor a module may import those that stand before it.
ORDER = [
    ["core"],
    ["quant"], ["frontend"], ["nn"], ["losses"], ["metrics"],
    ["models"], ["data"], ["checkpoint"], ["artifact"], ["interop"], ["scoring"], ["model"], ["html"],
    ["verifier"], ["moments"], ["recalibrate"], ["diagnostics"],
    ["train_config"], ["optim"], ["kmqat"], ["train_lib"], ["train_loop"],
]  # fmt: skip
FLOOR_1 = {"quant", "frontend", "nn", "losses", "metrics"}
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module):
    names = module.split(".")
    return names[1] if names[0] == "kmq_jax" and len(names) > 1 else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here in ("__init__", "bench"):
        return
    for module in imports(path):
        there = part(module)
        if there in RANK and there != here:
            assert here not in RANK or RANK[there] < RANK[here], f"{here} imports {module}"
            if here in FLOOR_1:
                assert there == "core", f"{here} imports {module}: floor 1 needs core only"
        elif here in RANK and there is not None and there != here:
            assert (PACKAGE / f"{there}.py").exists() is False, f"{here} imports the command {module}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda p: p.name)
def test_core_needs_jax_and_numpy_only(path):
    allowed = {"jax", "numpy", "kmq_jax", "tqdm", "tensorboardX"}  # the last only where it is asked for
    standard = __import__("sys").stdlib_module_names
    assert {m.split(".")[0] for m in imports(path)} <= allowed | standard


def test_orbax_is_imported_in_one_place():
    users = [p.name for p in PACKAGE.rglob("*.py") if any(m.startswith("orbax") for m in imports(p))]
    assert users == ["checkpoint.py"]
