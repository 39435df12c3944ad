"""When compression that costs something up front pays: Chandar et al.'s savings ratio and break-even point."""

from __future__ import annotations

import math
from numbers import Real


def savings_ratio(
    original: float, compressed: float, *, rounds: float, clients: int = 1, cost: float = 0.0
) -> float:
    """Return how many times less travels in a federation, what was spent before the first round counted.

    Parameters
    ----------
    original, compressed : float
        An update and its payload: bytes, as measured, or the seconds that they take on a link.
    rounds : float
    clients : int
        That send an update in each round.
    cost : float
        In the same unit: the decoders' payloads, that is bytes of one times their number. In seconds the time of
        training the autoencoders belongs to it.

    Returns
    -------
    float
        original x rounds x clients / (compressed x rounds x clients + cost): Chandar et al., equations 4 to 6.

    Raises
    ------
    ValueError
        If a number is negative or not finite, or nothing is sent.

    Examples
    --------
    Chandar et al.'s figure 10: a decoder for all, 1,000 clients, 41 rounds.

    >>> import fedcodec as fc
    >>> round(fc.savings_ratio(550_570, 320, rounds=41, clients=1000, cost=352_915_690 / 2), 1)
    119.1
    """
    _check(original=original, compressed=compressed, rounds=rounds, clients=clients, cost=cost)
    updates = rounds * clients
    sent = compressed * updates + cost
    if not sent:
        raise ValueError(
            "nothing is sent: compressed, rounds and clients, or cost, must be above 0"
        )
    if math.isinf(sent):
        raise ValueError("the numbers are too large for a float")
    return original * updates / sent


def break_even(original: float, compressed: float, *, cost: float, clients: int = 1) -> float:
    """Return the rounds after which a savings ratio is 1; infinity if it never is.

    Parameters
    ----------
    original, compressed, cost, clients
        As for `savings_ratio`. Where each client has a decoder of its own, `cost` is that of one and `clients` is 1.

    Raises
    ------
    ValueError
        If a number is negative or not finite, or there are no clients.

    Examples
    --------
    Chandar et al.'s figure 11: a decoder for each client.

    >>> import fedcodec as fc
    >>> round(fc.break_even(550_570, 320, cost=352_915_690 / 2), 1)
    320.7
    """
    _check(original=original, compressed=compressed, cost=cost, clients=clients)
    if not clients:
        raise ValueError("clients is 0, there must be one")
    saved = (original - compressed) * clients
    if cost == 0:
        return 0.0 if saved >= 0 else math.inf
    return cost / saved if saved > 0 else math.inf


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}, it must be a number")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, it must be finite and not negative")
