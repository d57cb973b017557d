import jax.numpy as jnp
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, match_rules, named_leaves

TREE = {"stem": {"kernel": 1, "bias": 2}, "blocks": [{"kernel": 3}, {"kernel": 4}]}


def test_names_join_keys_and_positions():
    assert named_leaves(TREE) == [
        ("blocks/0/kernel", 3),
        ("blocks/1/kernel", 4),
        ("stem/bias", 2),
        ("stem/kernel", 1),
    ]


def test_map_named_sees_the_name_and_all_trees():
    doubled = map_named(lambda name, x, y: (name, x + y), TREE, TREE)
    assert doubled["blocks"][1]["kernel"] == ("blocks/1/kernel", 8)


def test_first_matching_rule_wins_and_others_take_the_default():
    rules = [("stem/kernel", "a"), ("kernel", "b")]
    names = [name for name, _ in named_leaves(TREE)]
    assert match_rules(rules, names, default="-") == {
        "blocks/0/kernel": "b",
        "blocks/1/kernel": "b",
        "stem/bias": "-",
        "stem/kernel": "a",
    }


@pytest.mark.parametrize("rules", [[("kernal", 1)], [("kernel", 1), ("stem/kernel", 2)]])
def test_a_rule_that_is_never_first_raises(rules):
    with pytest.raises(UserError, match=rules[-1][0]):
        match_rules(rules, ["stem/kernel", "head/kernel"])


def test_a_pattern_that_is_no_expression_raises():
    with pytest.raises(UserError, match="regular expression"):
        match_rules([("(", 1)], ["a"])


def test_arrays_keep_their_place():
    ((name, leaf),) = named_leaves({"a": {"b": jnp.ones(2)}})
    assert name == "a/b" and leaf.shape == (2,)
