#!/usr/bin/env python3
"""Counts what can be counted of the structure of checkouts, and prints it as JSON.

    git worktree add /tmp/before 18961c9
    python .ci/house.py before=/tmp/before now=. >.github/results/house.json && kmq-jax tables --file=kmq_jax/README.md

Needs ruff on the path (for complexity and statements). Everything else is read from the source.
"""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def modules(root: Path) -> dict[str, ast.Module]:
    """The parsed modules of the package below `root`, by dotted name."""
    found = {}
    for path in sorted((root / "kmq_jax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def without_types(tree: ast.Module) -> ast.Module:
    """The module without its `if TYPE_CHECKING:` blocks."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module(kept, [])


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that one module imports, also inside functions, but not for types alone."""
    found = set()
    for node in ast.walk(without_types(tree)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name.startswith("kmq_jax."):
                found.add(name)
    return found


def circles(graph: dict[str, set[str]]) -> int:
    """How many groups of modules import one another (strongly connected components of two or more)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, edges: dict[str, set[str]], out: list[str]) -> None:
        stack = [(node, iter(sorted(edges[node])))]
        seen.add(node)
        while stack:
            current, rest = stack[-1]
            for other in rest:
                if other not in seen and other in edges:
                    seen.add(other)
                    stack.append((other, iter(sorted(edges[other]))))
                    break
            else:
                stack.pop()
                out.append(current)

    for node in sorted(graph):
        if node not in seen:
            visit(node, graph, order)
    backward: dict[str, set[str]] = {node: set() for node in graph}
    for node, others in graph.items():
        for other in others & graph.keys():
            backward[other].add(node)
    seen.clear()
    count = 0
    for node in reversed(order):
        if node not in seen:
            group: list[str] = []
            visit(node, backward, group)
            count += len(group) > 1
    return count


def ruff_figures(root: Path, rule: str, setting: str) -> int:
    """The largest value that ruff finds for a rule, such as C901."""
    command = ["ruff", "check", "--isolated", "--select", rule, "--config", f"{setting}=0", "--output-format", "json"]
    done = subprocess.run([*command, "kmq_jax"], cwd=root, capture_output=True, text=True)
    numbers = [int(re.search(r"\((\d+) >", entry["message"])[1]) for entry in json.loads(done.stdout)]
    return max(numbers, default=0)


# The second meaning of a word: where it is looked for, what it looks like there, and what is another thing.
SECOND_MEANINGS = {
    "`width`, of precision": (
        r"quant|ptq|kmqat|calibrate|cascade|scoring|diagnos|verif|study|tables",
        r"\bwidths?\b",
        r"channel|network|band|figure|half.width|max-width|\[height, width|\"width\": \d",
    ),
    "`stage`, of a cascade": (
        r"cascade|calibrate|verif|scoring/(?!levels)",
        r"\bstages?\b",
        r"--stage|flag=\"stage\"|\"stages\" if \"stages\"",
    ),
    "`calibrate`, of weights": (r"", r"\brecalibrat", r"\"--recalibrate\": "),
}
"""Old flags that are told, and files of before that are read, keep a word without its meaning."""


def second_meanings(text: dict[str, str]) -> dict[str, int]:
    """How many lines use a word in a second meaning, by word; `text` holds modules by their path in the package."""
    found = {}
    for word, (places, looks, other) in SECOND_MEANINGS.items():
        lines = [line for path, source in text.items() if re.search(places, path) for line in source.splitlines()]
        found[word] = sum(bool(re.search(looks, line)) and not re.search(other, line) for line in lines)
    return found


def shared_names(trees: dict[str, ast.Module]) -> int:
    """How many names stand for a module and for something else that its package offers, as a function of that name."""
    count = 0
    for name, tree in trees.items():
        inside = {other.rpartition(".")[2] for other in trees if other.rpartition(".")[0] == name}
        offered = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                   for alias in node.names if f"{node.module}.{alias.name}" not in trees}  # fmt: skip
        lazily = (
            {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} if name == "kmq_jax" else set()
        )
        count += len(inside & (offered | lazily))
    return count


def measure(root: Path) -> dict[str, int]:
    """Every row of the table for one checkout."""
    trees = modules(root)
    known = set(trees)
    graph = {name: imports(tree, known) - {name} for name, tree in trees.items()}
    room = {name: name.split(".")[1] if name.count(".") else "kmq_jax" for name in trees}
    arrows = {(room[a], room[b]) for a, others in graph.items() for b in others if room[a] != room[b]}
    rooms: dict[str, int] = defaultdict(int)
    for name in trees:
        rooms[room[name]] += 1
    functions = [
        node.end_lineno - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    text = {path: path.read_text() for path in (root / "kmq_jax").rglob("*.py")}
    lines = [line for source in text.values() for line in source.splitlines()]
    plumbing = {"main", "command", "flags", "config_flags", "completion", "__init__"}
    commands = [path for path in text if path.parent.name == "cli" and path.stem not in plumbing]
    top = [path for path in text if path.parent.name == "kmq_jax" and not path.name.startswith("_")]
    old = [path for path in top if re.search(r"^def main\(", text[path], re.M)]
    command_modules = {name for name in trees if name.startswith("kmq_jax.cli.")} or {f"kmq_jax.{p.stem}" for p in old}
    command_modules -= {f"kmq_jax.cli.{stem}" for stem in plumbing}
    among = sum(len(graph[name] & command_modules) for name in command_modules)
    sizes = [len(text[path].splitlines()) for path in (commands or old)]
    meanings = second_meanings({str(path.relative_to(root / "kmq_jax")): source for path, source in text.items()})
    meanings["a module and a function of one name"] = shared_names(trees)
    return {
        "rooms (packages and single modules at the top)": len(rooms),
        "modules": len(trees),
        "import arrows between rooms": len(arrows),
        "circles of modules": circles(graph),
        "longest function, lines": max(functions),
        "most statements in a function": ruff_figures(root, "PLR0915", "lint.pylint.max-statements"),
        "highest complexity": ruff_figures(root, "C901", "lint.mccabe.max-complexity"),
        "lines with `Any`": sum(bool(re.search(r"\bAny\b", line)) for line in lines),
        "modules that name `ResNet`": sum(bool(re.search(r"\bResNet\b", source)) for source in text.values()),
        "lines of all command modules": sum(sizes),
        "longest command module, lines": max(sizes, default=0),
        "imports among commands": among,
        "functions that take a parser's namespace": sum("argparse.Namespace" in line for line in lines),
        "words with several meanings": sum(map(bool, meanings.values())),
        **{f"lines of {word}" if "`" in word else word: count for word, count in meanings.items()},
        "comment-only lines, per mille": round(
            1000 * sum(line.strip().startswith("#") for line in lines) / max(len(lines), 1)
        ),
        "lines of examples in docstrings": sum(line.strip().startswith(">>>") for line in lines),
        "lines": len(lines),
    }


def main() -> None:
    """Prints the figures of the checkouts that are given as NAME=DIRECTORY."""
    columns = []
    for word in sys.argv[1:] or ["now=."]:
        name, _, place = word.partition("=")
        root = Path(place).resolve()
        revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        columns.append({"name": name, "revision": revision.stdout.strip(), "figures": measure(root)})
    print(json.dumps({"kind": "house", "columns": columns}, indent=2))


if __name__ == "__main__":
    main()
