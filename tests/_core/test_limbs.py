"""The sum of what ranks send, compared with exact arithmetic."""

import math
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from torchclip._core.ranks import limbs

INF = math.inf
F64 = torch.float64


def norms_of_ranks(generator: random.Random) -> Iterator[list[float]]:
    """Of few and of many ranks, in a narrow range and from 1e-320 to 1e300."""
    for ranks in (1, 2, 3, 7, 1000) * 8:
        scale = 10.0 ** generator.uniform(-300, 299)
        yield [generator.random() * scale for _ in range(ranks)]
        yield [10.0 ** generator.uniform(-320, 300) for _ in range(ranks)]
        yield [5e-324 * generator.randrange(4) for _ in range(ranks)]


def joint(norms: list[float], order: float, on_host: bool) -> float:
    """What every rank of these computes: each sends the words of its norm, and they are added."""
    sent = norms if on_host else torch.tensor(norms, dtype=F64)
    total = limbs.words(sent, order).sum(dim=0, keepdim=True)
    found = limbs.joint(total, order, on_host)
    assert isinstance(found, list) == on_host
    return float(found[0])


def power_of(norm: Fraction, order: float) -> Fraction:
    return norm * norm if order == 2 else norm


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_joint_norms_are_those_of_exact_fractions(order: float) -> None:
    generator = random.Random(0)
    for norms in norms_of_ranks(generator):
        power = sum((power_of(Fraction(norm), order) for norm in norms), Fraction(0))
        on_host, on_device = joint(norms, order, True), joint(norms, order, False)
        # The nearest float64 number: the exact norm lies between the middles to its neighbors.
        half = Fraction(math.ulp(on_host)) / 2
        below, above = max(Fraction(on_host) - half, Fraction(0)), Fraction(on_host) + half
        assert power_of(below, order) <= power <= power_of(above, order)
        assert abs(on_device - on_host) <= math.ulp(on_host)
        shuffled = generator.sample(norms, len(norms))
        assert (joint(shuffled, order, True), joint(shuffled, order, False)) == (on_host, on_device)


@pytest.mark.parametrize("on_host", [True, False])
def test_what_is_no_number_of_the_sum(on_host: bool) -> None:
    largest = torch.finfo(F64).max
    for order in limbs.EXACT:
        assert math.isnan(joint([3.0, math.nan, INF, -1.0], order, on_host))
        assert joint([3.0, INF, -1.0], order, on_host) == INF
        assert joint([-1.0, -1.0], order, on_host) == -1
        assert joint([-1.0, 0.0], order, on_host) == 0
        assert joint([largest] * 1000, order, on_host) == INF
        assert joint([largest], order, on_host) == largest
    assert joint([5.0, 7.0], 0.0, on_host) == 12


@pytest.mark.parametrize("order", [0.01, 0.5, 3.0, 100.0, -1.0, -2.5, INF, -INF])
def test_leading_norms_and_shares_of_other_orders(order: float) -> None:
    generator = random.Random(0)
    for _ in range(50):
        scale = 10.0 ** generator.uniform(-200, 200)
        norms = torch.tensor([scale * (0.01 + generator.random()) for _ in range(5)], dtype=F64)
        leading = limbs.leading(limbs.keys(norms, order).amax(dim=0, keepdim=True), order)
        assert leading == (norms.amax() if order > 0 else norms.amin())
        if math.isinf(order):
            continue
        total = limbs.joint(limbs.words(limbs.shares(norms, leading, order), 1.0).sum(0, True), 1.0, False)
        assert isinstance(total, Tensor)
        expected = leading * (norms / leading).pow(order).sum().log().div(order).exp()
        torch.testing.assert_close(limbs.from_shares(leading, total, order), expected, rtol=1e-12, atol=0)
    cases = [([0.0, 3.0], 3.0 if order > 0 else 0.0), ([-1.0, -1.0], -1.0), ([INF, -1.0], INF)]
    for numbers, whole in cases:
        sent = torch.tensor(numbers, dtype=F64)
        leading = limbs.leading(limbs.keys(sent, order).amax(dim=0, keepdim=True), order)
        assert limbs.from_shares(leading, limbs.shares(sent, leading, order).sum(0, True), order) == whole
    with_nan = limbs.keys(torch.tensor([INF, math.nan], dtype=F64), order).amax(dim=0, keepdim=True)
    assert limbs.leading(with_nan, order).isnan()


def test_tensors_are_not_read() -> None:
    """On the device `meta` there is nothing to read."""
    norms = torch.ones(3, dtype=F64, device="meta")
    for order in limbs.EXACT:
        found = limbs.joint(limbs.words(norms, order), order, False)
        assert isinstance(found, Tensor)
        assert found.shape == (3,)
    leading = limbs.leading(limbs.keys(norms, 3.0), 3.0)
    assert limbs.from_shares(leading, limbs.shares(norms, leading, 3.0), 3.0).is_meta
