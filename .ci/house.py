#!/usr/bin/env python3
"""Prints what can be counted of the structure of one or more checkouts, as a Markdown table: `.ci/house.py OLD NEW`.

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
    commands = [path for path in text if path.parent.name == "cli"]
    top = [path for path in text if path.parent.name == "kmq_jax" and not path.name.startswith("_")]
    old = [path for path in top if re.search(r"^def main\(", text[path], re.M)]
    command_modules = {name for name in trees if name.startswith("kmq_jax.cli.")} or {f"kmq_jax.{p.stem}" for p in old}
    plumbing = {"kmq_jax.cli.main", "kmq_jax.cli.command", "kmq_jax.cli.flags", "kmq_jax.cli.config_flags"}
    among = sum(len(graph[name] & command_modules - plumbing) for name in command_modules - plumbing)
    sizes = [len(text[path].splitlines()) for path in (commands or old)]
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
        "lines that say width for precision": sum(
            bool(re.search(r"\bwidths?\b", line)) and not re.search(r"channel|network|band|figure|half.width", line)
            for line in lines
        ),
        "comment-only lines, per mille": round(
            1000 * sum(line.strip().startswith("#") for line in lines) / max(len(lines), 1)
        ),
        "lines of examples in docstrings": sum(line.strip().startswith(">>>") for line in lines),
        "lines": len(lines),
    }


def main() -> None:
    """Prints the table."""
    roots = [Path(word).resolve() for word in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    columns = [measure(root) for root in roots]
    print("| | " + " | ".join(root.name for root in roots) + " |")
    print("|---" * (len(roots) + 1) + "|")
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(f"{column[row]:,}" for column in columns) + " |")


if __name__ == "__main__":
    main()
