"""Named paths into pytrees, and rules on those names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from kmq_jax.core.errors import UserError

T = TypeVar("T")


def path_name(path: tuple[Any, ...]) -> str:
    """Turns a jax key path into a "/"-joined name: `stage1/block0/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Returns `(name, leaf)` for every leaf, in jax's order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def map_named(function: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Like `jax.tree.map`, but `function` is called as `function(name, leaf, *rest_leaves)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def replace_named(tree: Any, values: Mapping[str, Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The tree with the leaves that `values` names replaced."""
    return map_named(lambda name, leaf: values.get(name, leaf), tree, is_leaf=is_leaf)


def match_rules(rules: Sequence[tuple[str, T]], names: Iterable[str], default: Any = None) -> dict[str, T | Any]:
    """Gives each name the value of the first rule whose pattern is found in it.

    Args:
        rules: `(regular expression, value)`; the expression is searched for anywhere in the name.
        names: the names to decide on.
        default: the value of names that no rule matches.

    Returns:
        `{name: value}` in the order of `names`.

    Raises:
        UserError: a pattern is not a regular expression, or it is the first match of no name: an unused rule is
            nearly always a misspelt one.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(f"rule pattern {pattern!r} is not a regular expression: {error}") from error
    used = [False] * len(compiled)
    values: dict[str, T | Any] = {}
    for name in names:
        values[name] = default
        for i, (expression, value) in enumerate(compiled):
            if expression.search(name):
                values[name] = value
                used[i] = True
                break
    for (expression, _), was_used in zip(compiled, used):
        if not was_used:
            raise UserError(f"rule pattern {expression.pattern!r} is the first match of no name")
    return values
