"""How quantized trees are written by `flax.serialization` (`to_bytes`) and by `jax.export` (`serialize`)."""

import dataclasses
import json
from typing import TypeVar

import jax.export
from flax import serialization

from kmq_jax.core.tree import Params
from kmq_jax.quant.ste import Codebook
from kmq_jax.quant.types import CodebookTensor

Node = TypeVar("Node", CodebookTensor, Codebook)


def _fields(node: type[Node], static: bool) -> list[str]:
    """The names of a class's fields: those that are static, or those that hold arrays."""
    return [field.name for field in dataclasses.fields(node) if bool(field.metadata.get("static")) == static]


def _to_state(tensor: Node) -> dict[str, Params]:
    return {name: serialization.to_state_dict(getattr(tensor, name)) for name in _fields(type(tensor), False)}


def _from_state(target: Node, state: dict[str, Params]) -> Node:
    """Takes the arrays from the state, and the static fields from the target."""
    restored = {name: serialization.from_state_dict(getattr(target, name), state[name], name) for name in state}
    return dataclasses.replace(target, **restored)


def _from_children(node: type[Node], static: tuple, children: tuple) -> Node:
    return node(
        **dict(zip(_fields(node, False), children, strict=True)),
        **dict(zip(_fields(node, True), static, strict=True)),
    )


def _read_static(text: bytes | bytearray) -> tuple:
    # JSON has no tuples: they come back as lists.
    return tuple(tuple(value) if isinstance(value, list) else value for value in json.loads(text))


def _register(node: type[Node]) -> None:
    serialization.register_serialization_state(node, _to_state, _from_state)
    jax.export.register_pytree_node_serialization(
        node,
        serialized_name=f"kmq_jax.{node.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=_read_static,
        from_children=lambda static, children: _from_children(node, static, children),
    )


_register(CodebookTensor)
_register(Codebook)
