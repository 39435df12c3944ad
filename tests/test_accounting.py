"""Savings ratio and break-even point, against Chandar et al.'s figures and by their own definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedcodec as fc

VALUES, LATENTS, PARAMETERS = 550_570, 320, 352_915_690
positive = st.floats(1, 1e12)


def test_the_papers_break_even_points():
    assert fc.break_even(VALUES, LATENTS, cost=PARAMETERS / 2) == pytest.approx(320.7, abs=0.05)
    # One decoder for all: 40 clients need the 8 rounds that figure 10 does not name.
    assert 8 < fc.break_even(VALUES, LATENTS, cost=PARAMETERS / 2, clients=40) < 8.1


def test_the_papers_savings_ratios():
    def ratio(rounds, clients):
        return fc.savings_ratio(
            VALUES, LATENTS, rounds=rounds, clients=clients, cost=PARAMETERS / 2
        )

    assert ratio(41, 1000) == pytest.approx(120, abs=1)
    assert ratio(1e9, 1) == pytest.approx(VALUES / LATENTS, rel=1e-3)


@given(positive, positive, positive, st.integers(1, 10**6))
def test_at_the_break_even_point_the_ratio_is_one(original, compressed, cost, clients):
    rounds = fc.break_even(original, compressed, cost=cost, clients=clients)
    if original <= compressed:
        assert rounds == math.inf
    elif rounds < 1e12 and original - compressed > 1e-6 * original:
        ratio = fc.savings_ratio(original, compressed, rounds=rounds, clients=clients, cost=cost)
        assert ratio == pytest.approx(1, rel=1e-6)


def test_what_costs_nothing_pays_at_once_unless_it_is_larger():
    assert fc.break_even(2, 1, cost=0) == 0
    assert fc.break_even(1, 1, cost=0) == 0
    assert fc.break_even(1, 2, cost=0) == math.inf


@pytest.mark.parametrize("name", ["original", "compressed", "rounds", "clients", "cost"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_wrong_numbers_are_named(name, value):
    numbers = {"original": 2, "compressed": 1, "rounds": 3, "clients": 4, "cost": 5} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        fc.savings_ratio(numbers.pop("original"), numbers.pop("compressed"), **numbers)


def test_nothing_sent_has_no_ratio():
    with pytest.raises(ValueError, match="nothing is sent"):
        fc.savings_ratio(1, 0, rounds=1)
    with pytest.raises(ValueError, match="clients is 0"):
        fc.break_even(1, 0, cost=1, clients=0)
