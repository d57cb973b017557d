"""Names of the leaves of a tree, and rules on those names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, overload

import jax
from jax.tree_util import DictKey, GetAttrKey, KeyPath

from kmq_jax.core.errors import UserError
from kmq_jax.core.limits import time_limit

Array: TypeAlias = Any
"""An array of jax or of numpy: they share the methods used here, but no type."""

Leaf: TypeAlias = Any
"""One array of a tree, its shape (`jax.ShapeDtypeStruct`), or a node that is taken as a leaf (`CodebookTensor`)."""

Params: TypeAlias = Any
"""A tree of arrays: nested dicts as Linen has them, an NNX state, lists, dataclasses."""

Variables: TypeAlias = Any
"""What a network is applied with: `{"params": tree, "batch_stats": tree}`."""

IsLeaf: TypeAlias = Callable[[Leaf], bool] | None

_PATIENCE = 10.0  # seconds for all rules on all names; a tree of thousands of names takes milliseconds

T = TypeVar("T")
D = TypeVar("D")


def path_name(path: KeyPath) -> str:
    """Turns a jax key path into a "/"-joined name.

    NNX puts each array behind an attribute `value`. The name leaves it out, so that rules fit Linen and NNX alike.

    >>> from jax.tree_util import DictKey, GetAttrKey
    >>> path_name((DictKey("encoder"), DictKey("conv1"), DictKey("kernel")))
    'encoder/conv1/kernel'
    >>> path_name((DictKey("conv1"), DictKey("kernel"), GetAttrKey("value")))
    'conv1/kernel'
    """
    kept = [key for i, key in enumerate(path) if not (i and _is_nnx_value(path[i - 1], key))]
    return jax.tree_util.keystr(tuple(kept), simple=True, separator="/")


def _is_nnx_value(before: object, key: object) -> bool:
    return isinstance(before, DictKey) and isinstance(key, GetAttrKey) and key.name == "value"


def named_leaves(tree: Params, is_leaf: IsLeaf = None) -> list[tuple[str, Leaf]]:
    """Returns `(name, leaf)` for every leaf, in jax's order.

    >>> named_leaves({"b": [1, 2], "a": 3})
    [('a', 3), ('b/0', 1), ('b/1', 2)]
    """
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def map_named(function: Callable[..., Leaf], tree: Params, *rest: Params, is_leaf: IsLeaf = None) -> Params:
    """Like `jax.tree.map`, but `function` is called as `function(name, leaf, *rest_leaves)`.

    >>> map_named(lambda name, leaf: f"{name}={leaf}", {"a": 1, "b": {"c": 2}})
    {'a': 'a=1', 'b': {'c': 'b/c=2'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def replace_named(tree: Params, values: Mapping[str, Leaf], is_leaf: IsLeaf = None) -> Params:
    """The tree with the leaves that `values` names replaced. A name that the tree lacks is ignored.

    >>> replace_named({"a": 1, "b": {"c": 2}}, {"b/c": 5})
    {'a': 1, 'b': {'c': 5}}
    """
    return map_named(lambda name, leaf: values.get(name, leaf), tree, is_leaf=is_leaf)


@overload
def match_rules(rules: Sequence[tuple[str, T]], names: Iterable[str]) -> dict[str, T | None]: ...


@overload
def match_rules(rules: Sequence[tuple[str, T]], names: Iterable[str], default: D) -> dict[str, T | D]: ...


def match_rules(rules: Sequence[tuple[str, T]], names: Iterable[str], default: Any = None) -> dict[str, T | Any]:
    """Gives each name the value of the first rule whose pattern is found in it.

    >>> match_rules([("conv", 2), ("kernel$", 4)], ["conv1/kernel", "head/kernel", "head/bias"])
    {'conv1/kernel': 2, 'head/kernel': 4, 'head/bias': None}

    Args:
        rules: `(regular expression, value)`; the expression is searched for anywhere in the name.
        names: the names to decide on.
        default: the value of names that no rule matches.

    Returns:
        `{name: value}` in the order of `names`.

    Raises:
        UserError: a pattern is not a regular expression, takes too long to match, or is the first match of no name: an
            unused rule is nearly always a misspelt one.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except (re.error, RecursionError, OverflowError, TypeError) as error:
            raise UserError(f"rule pattern {pattern!r} is not a regular expression: {error}") from error
    used = [False] * len(compiled)
    values: dict[str, T | Any] = {}
    # Some expressions, such as (a+)+$, take longer than anyone can wait.
    with time_limit(_PATIENCE, f"rule patterns {', '.join(repr(pattern) for pattern, _ in rules)}"):
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
