"""Numbers as pages show them."""

import math

from kmq_jax import html


def test_what_is_no_number_is_a_dash_and_infinity_has_a_sign():
    assert [html.number(value) for value in (math.nan, math.inf, -math.inf)] == ["–", "∞", "−∞"]
    assert html.percent(math.nan) == html.p_value(math.nan) == "–"
    assert html.percent(0.5) == "50.00 %"
