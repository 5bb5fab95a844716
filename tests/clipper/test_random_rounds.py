"""Random rounds of several optimizers: all is as if somebody had clipped all gradients by hand in each round.

Backward passes reach some parameters only, optimizers step in any order, seldom or twice, gradients are set
to zero or None, states are taken, and the Clipper is detached and made anew.  A run that fails prints what it
did.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchclip
from torchclip import Clipper

pytestmark = pytest.mark.usefixtures("each_way")

MAX_NORM = 1.0


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class ByHand:
    """Optimizers whose gradients are clipped once in each round.

    Attributes:
        norms: that of each round that is over.
    """

    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers
        self.norms: list[float] = []
        self._norm = 0.0
        self._stepped: set[int] = set()
        # The parameters with a gradient that is newer than the clipping, or than the optimizer's step.
        self._new: list[set[int]] = [set() for _ in optimizers]

    def missing(self) -> int:
        """The first one that has not stepped in this round."""
        missing: int = min({*range(len(self.optimizers))} - self._stepped)
        return missing

    def has_gradients(self, parameters: list[Tensor]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            self._new[i].update({*map(id, parameters_of(optimizer))} & {*map(id, parameters)})

    def _has_new(self, i: int) -> bool:
        grads = [p.grad for p in parameters_of(self.optimizers[i]) if id(p) in self._new[i]]
        return any(grad is not None and bool(grad.any()) for grad in grads)

    def step(self, i: int) -> bool:
        """Whether the optimizer may step."""
        goes_on = self._stepped and i not in self._stepped and not any(map(self._has_new, self._stepped))
        if goes_on and self._has_new(i):
            return False
        if not goes_on:
            self.close()
            held = {id(p): p for optimizer in self.optimizers for p in parameters_of(optimizer)}
            self._norm = float(torchclip.clip_grad_norm_(held.values(), MAX_NORM))
            self._new = [set() for _ in self.optimizers]
        self.optimizers[i].step()
        self._stepped.add(i)
        self._new[i] = set()
        if len(self._stepped) == len(self.optimizers):
            self.close()
        return True

    def close(self) -> None:
        if self._stepped:
            self.norms.append(self._norm)
        self._stepped = set()


class Training:
    """The same training with a Clipper and by hand."""

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        self.rng, self.say = random.Random(seed), say
        self.torch_rng = torch.Generator().manual_seed(seed)
        count = self.rng.choice([2, 2, 3])
        held = [[self.parameter() for _ in range(self.rng.randint(1, 3))] for _ in range(count)]
        if self.rng.random() < 0.3:
            held[1].append(held[0][0])
        self.parameters = [*{id(p): p for of_one in held for p in of_one}.values()]
        copies = {id(p): nn.Parameter(p.detach().clone()) for p in self.parameters}
        self.copies = [*copies.values()]
        options: list[dict[str, Any]] = [
            self.rng.choice([{"fused": True}, {"momentum": 0.5}, {}]) for _ in held
        ]
        say(f"{options}, {[len(of_one) for of_one in held]} parameters")
        self.optimizers, by_hand = (
            [torch.optim.SGD(ps, lr=0.1 * (i + 1), **options[i]) for i, ps in enumerate(of_all)]
            for of_all in (held, [[copies[id(p)] for p in of_one] for of_one in held])
        )
        self.by_hand = ByHand(by_hand)
        self.clipper = Clipper(self.optimizers, MAX_NORM)

    def parameter(self) -> nn.Parameter:
        shape = self.rng.choice([(3,), (2, 2), (1,)])
        return nn.Parameter(torch.randn(shape, generator=self.torch_rng))

    def backward(self) -> None:
        share = self.rng.choice([0.3, 1.0])
        used = [i for i in range(len(self.parameters)) if self.rng.random() < share]
        self.say(f"backward pass to {used}")
        for i in used:
            factors = torch.randn(self.copies[i].shape, generator=self.torch_rng) * self.rng.choice(
                [0.1, 3.0]
            )
            for parameters in (self.parameters, self.copies):
                torch.autograd.backward((parameters[i] * factors).sum())
        self.by_hand.has_gradients([self.copies[i] for i in used])

    def zero(self, i: int, set_to_none: bool) -> None:
        self.say(f"zero_grad({set_to_none}) of {i}")
        for optimizers in (self.optimizers, self.by_hand.optimizers):
            optimizers[i].zero_grad(set_to_none)

    def renew(self) -> None:
        self.say("a new Clipper")
        self.clipper.detach()
        self.by_hand.close()
        self.check()
        self.by_hand.norms.clear()
        self.clipper = Clipper(self.optimizers, MAX_NORM)

    def step(self, i: int) -> None:
        self.say(f"step of {i}")
        if self.by_hand.step(i):
            self.optimizers[i].step()
            return
        with pytest.raises(RuntimeError, match=rf"optimizer {i} \(SGD\) have changed since"):
            self.optimizers[i].step()
        for j in range(len(self.optimizers)):
            self.zero(j, True)

    def check(self) -> None:
        assert self.clipper.state_dict()["steps"] == len(self.by_hand.norms)
        assert [record.total_norm for record in self.clipper.history] == pytest.approx(
            self.by_hand.norms, rel=1e-4, abs=1e-5
        )
        for ours, theirs in zip(self.parameters, self.copies, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def run(self, events: int) -> None:
        count = len(self.optimizers)
        for _ in range(events):
            what = self.rng.random()
            if what < 0.3:
                self.backward()
            elif what < 0.45:
                self.zero(self.rng.randrange(count), self.rng.random() < 0.6)
            elif what < 0.48:
                self.renew()
            else:
                self.step(self.rng.randrange(count) if self.rng.random() < 0.4 else self.by_hand.missing())
            self.check()
        self.renew()
        for ours, theirs in zip(self.parameters, self.copies, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seeds", [range(i, i + 20) for i in range(0, 120, 20)], ids=str)
def test_random_rounds_are_as_clipped_by_hand(seeds: range) -> None:
    for seed in seeds:
        said: list[str] = []
        try:
            Training(seed, said.append).run(events=40)
        except BaseException:
            print(f"seed {seed}", *said, sep="\n")
            raise
