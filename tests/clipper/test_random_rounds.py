"""Random rounds of several optimizers: the result is that of clipping all gradients by hand in each round.

Backward passes reach some parameters only, and some of their gradients are not finite.  Optimizers step in
any order, rarely or twice, with closures or a GradScaler; steps fail, and user code changes gradients in the
middle of them.  Gradients are set to zero or None, states are saved and loaded within rounds, and the Clipper
is made anew.  A run that fails prints what it did.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import INF, LEARNED, Array, ByHand, Look, Raised, Result, assert_close, broken, numpy, run_each
from torch import Tensor, nn
from torch.amp import GradScaler

from torchclip import Clipper
from torchclip._core import gather
from torchclip._core.accelerator import AcceleratorBatch

Act = Callable[[list[nn.Parameter]], None]
"""A change by user code to the parameters, or to their copies."""


class Rounds:
    """Optimizers whose gradients are clipped by hand, once in each round.

    Attributes:
        records: the result and the loss of each finished round.
        stepped: the optimizers that have stepped in the open round.
        loss: the next round's.
    """

    def __init__(self, optimizers: list[torch.optim.SGD], hand: ByHand, own: list[Any]) -> None:
        self.optimizers, self.hand, self.own = optimizers, hand, own
        self.records: list[tuple[Result, float | None]] = []
        self.stepped: set[int] = set()
        self.loss: float | None = None
        self._open: tuple[Result, float | None] | None = None
        self._learned: Any = {}  # before the open round
        self._skips: list[bool] = []
        # The parameters with a gradient that is newer than the clipping, or than the optimizer's step.
        self._new: list[set[int]] = [set() for _ in optimizers]

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        return [optimizer.param_groups[0]["params"] for optimizer in self.optimizers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*{id(p): p for group in self.groups for p in group}.values()]

    def look(self) -> Look:
        return [
            [None if p.grad is None else (id(p.grad), numpy(p.grad)) for p in group] for group in self.groups
        ]

    @property
    def goes_on_after_a_failure(self) -> bool:
        """Whether a later step of the open round has failed, with the gradients that were clipped in it."""
        return self._open is not None and not self._open[0].skipped

    def has_gradients(self, parameters: Iterable[Tensor]) -> None:
        for new, group in zip(self._new, self.groups, strict=True):
            new.update({*map(id, group)} & {*map(id, parameters)})

    def has_new(self, i: int) -> bool:
        grads = [p.grad for p in self.groups[i] if id(p) in self._new[i]]
        return any(grad is not None and bool(grad.any()) for grad in grads)

    def overflows(self, i: int) -> bool:
        return any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in self.groups[i])

    def step(self, i: int, closure: Act | None, user: Act | None, breaks: str, overflows: bool) -> str:
        """Step, or return why the step must fail."""
        fused = self.optimizers[i].defaults["fused"]
        if overflows and not fused:
            return ""  # the GradScaler does not call it
        if self.stepped and i not in self.stepped and not any(map(self.has_new, self.stepped)):
            if self.has_new(i):
                self.loss = None
                return "have changed since they were clipped"
            if closure is not None:
                closure(self.parameters)
                if self.has_new(i):
                    return "computed new gradients"
        else:
            self.close()
            if closure is not None:
                closure(self.parameters)
            refused = self._clip(user, overflows)
            if refused:
                return refused
        if breaks:
            self._open = self._open if self.stepped else None
            return "Raised"
        assert self._open is not None
        if not self._open[0].skipped and not overflows:
            self.optimizers[i].step()
        self.stepped.add(i)
        self._skips.append(overflows)
        self._new[i] = set()
        if len(self.stepped) == len(self.optimizers):
            self.close()
        return ""

    def _clip(self, user: Act | None, overflows: bool) -> str:
        """Open a round."""
        learned, asked = copy.deepcopy(self.hand.seen), dict[str, float]()
        own, number = self.own, len(self.records)
        loss, self.loss = self.loss, None
        before = self.look()
        result = self.hand.judge(before, own, number, asked)
        if overflows and self.hand.nonfinite == "error":  # a step that a GradScaler skips is no error
            norm = self.hand.norm([grad[1] for group in before for grad in group if grad is not None])
            result = Result(norm, INF, 1.0, True, {})
        if result is None:
            return "non-finite"
        if user is not None:
            user(self.parameters)
            again = result if result.skipped else self.hand.judge(self.look(), own, number, asked)
            if again is None:
                return "non-finite"
            result = again
        if not result.skipped:
            for grad in (p.grad for p in self.parameters if p.grad is not None):
                grad.copy_(torch.from_numpy(result.grads[id(grad)]))
        self._new, self._learned = [set() for _ in self.optimizers], learned
        self._open = result, loss
        return ""

    def close(self) -> None:
        if self._open is not None and self.stepped:
            result, loss = self._open
            if all(self._skips):  # by a GradScaler
                result = Result(result.total_norm, INF, 1.0, True, {})
            self.records.append((result, loss))
        self._open, self.stepped, self._skips = None, set(), []

    def state(self) -> Any:
        """The state in the middle of a round: everything but the round."""
        return copy.deepcopy((self.records, self._learned if self.stepped else self.hand.seen))

    def load(self, state: Any) -> None:
        self._open, self.stepped, self._skips = None, set(), []
        self.records, self.hand.seen = copy.deepcopy(state)


class Training:
    """The same training with a Clipper and by hand."""

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        self.rng, self.say = random.Random(seed), say
        self.torch_rng = torch.Generator().manual_seed(seed)
        count = self.rng.choice([2, 2, 3])
        held = [[self.parameter() for _ in range(self.rng.randint(1, 3))] for _ in range(count)]
        self.scaler = None
        if self.rng.random() < 0.3:
            self.scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        elif self.rng.random() < 0.3:  # which a GradScaler would unscale twice
            held[1].append(held[0][0])
        self.parameters = [*{id(p): p for of_one in held for p in of_one}.values()]
        copies = {id(p): nn.Parameter(p.detach().clone()) for p in self.parameters}
        self.copies = [*copies.values()]
        options: list[dict[str, Any]] = [
            self.rng.choice([{"fused": True}, {"momentum": 0.5}, {}]) for _ in held
        ]
        self.optimizers, by_hand = (
            [torch.optim.SGD(ps, lr=0.1 * (i + 1), **options[i]) for i, ps in enumerate(of_all)]
            for of_all in (held, [[copies[id(p)] for p in of_one] for of_one in held])
        )
        usual = self.rng.random() < 0.4  # a number for all: the kernel takes the step
        # Thresholds that compare a norm with a limit would react to rounding.
        learned = [name for name in LEARNED if name not in ("zscore", "rolling sigma")]
        self.rule: Any = 1.0 if usual else self.rng.choice([0.0, lambda step: 2.0 / (1 + step), *learned])
        self.options: dict[str, Any] = {
            "scope": "global" if usual else self.rng.choice(["global", "group", "parameter"]),
            "nonfinite": self.rng.choice(["propagate", "error", "skip", "zero"]),
            "skip_above": None if usual else self.rng.choice([None, None, 5.0]),
        }
        # There a step may be skipped that the host knows nothing of, and goes on with.
        self.on_device = gather._local is AcceleratorBatch
        if self.on_device and self.options["nonfinite"] == "zero":
            self.options["skip_above"] = None
        self.listens = not usual and self.rng.random() < 0.5
        self.user: Act | None = None  # what on_clip does next
        # The thresholds of their only parameter groups.
        own = ["none" if usual else self.rng.choice(["none"] * 6 + [None, 0.5]) for _ in held]
        for optimizer, of_group in zip(self.optimizers, own, strict=True):
            if of_group != "none":
                optimizer.param_groups[0]["max_norm"] = of_group
        self.hand = Rounds(by_hand, ByHand(self.rule, **self.options), own)
        self.renew_clipper()
        self.saved = self.clipper.state_dict(), self.hand.state()
        say(f"{self.clipper!r} {options}, {[len(of_one) for of_one in held]} parameters")
        say(f"listens={self.listens}, scaler={self.scaler is not None}, {self.options}, {own}")

    def parameter(self) -> nn.Parameter:
        shape = self.rng.choice([(3,), (2, 2), (1,)])
        return nn.Parameter(torch.randn(shape, generator=self.torch_rng))

    def renew_clipper(self) -> None:
        def on_clip(_: object) -> None:
            user, self.user = self.user, None
            if user is not None:
                user(self.parameters)

        rule = LEARNED[self.rule][0]() if isinstance(self.rule, str) else self.rule
        listener = on_clip if self.listens else None
        self.clipper, self.hand.loss = Clipper(self.optimizers, rule, on_clip=listener, **self.options), None

    # Changes by the user to the parameters and to their copies

    def backward(self) -> Act:
        share = self.rng.choice([0.3, 1.0])
        used = [i for i in range(len(self.parameters)) if self.rng.random() < share]
        self.say(f"backward pass to {used}")
        factors = [torch.randn(p.shape, generator=self.torch_rng) for p in self.parameters]
        factors = [f * self.rng.choice([0.1, 3.0]) for f in factors]
        if used and self.rng.random() < 0.05:
            i, value = self.rng.choice(used), self.rng.choice([INF, -INF, float("nan")])
            factors[i].view(-1)[0] = value
            self.say(f"a gradient of {value} for {i}")

        def act(parameters: list[nn.Parameter]) -> None:
            ours = parameters is self.parameters
            for i in used:
                loss = (parameters[i] * factors[i]).sum()
                loss = self.scaler.scale(loss) if ours and self.scaler is not None else loss
                torch.autograd.backward(loss)
            if not ours:
                self.hand.has_gradients([parameters[i] for i in used])

        return act

    def zero(self, which: Iterable[int], set_to_none: bool) -> Act:
        which = [*which]
        self.say(f"zero_grad({set_to_none}) of {which}")

        def act(parameters: list[nn.Parameter]) -> None:
            for i in which:
                (self.optimizers if parameters is self.parameters else self.hand.optimizers)[i].zero_grad(
                    set_to_none
                )

        return act

    def meddle(self) -> Act:
        ways = [self.rng.choice(["", "", "in place", "replace", "none"]) for _ in self.parameters]

        def act(parameters: list[nn.Parameter]) -> None:
            for way, p in zip(ways, parameters, strict=True):
                if way == "in place" and p.grad is not None:
                    p.grad.mul_(3.0)
                elif way:
                    p.grad = None if way == "none" else torch.full_like(p, 0.5)

        return act

    def both(self, act: Act) -> None:
        for parameters in (self.parameters, self.copies):
            act(parameters)

    def zero_all(self) -> None:
        self.both(self.zero(range(len(self.optimizers)), True))

    # What happens to the Clipper

    def renew(self) -> None:
        self.say("a new Clipper")
        self.clipper.detach()
        self.hand.close()
        self.check()
        self.hand.load(([], {}))
        self.renew_clipper()

    def save(self) -> None:
        self.say("save")
        self.saved = json.loads(json.dumps(self.clipper.state_dict())), self.hand.state()

    def load(self) -> None:
        self.say("load")
        if self.rng.random() < 0.5:
            self.clipper.detach()
            self.renew_clipper()
        self.clipper.load_state_dict(self.saved[0])
        self.hand.load(self.saved[1])
        self.zero_all()

    def step(self, i: int, overflows: bool = False) -> None:
        closure = user = None
        breaks = ""
        kind = self.rng.random()
        if kind < 0.15 and self.scaler is None:
            closure = self.closure()
        elif kind < 0.25:
            breaks = self.rng.choice(["hook", "step"])
        if self.listens:
            user = self.rng.choice([None, None, None if self.on_device else self.meddle(), raise_])
        if self.clipper.loss is None and self.rng.random() < 0.5:
            self.clipper.loss = self.hand.loss = self.rng.random()
        self.say(f"step of {i}{' with a closure' * (closure is not None)} {breaks} {user}")
        self.user = user
        try:
            wrong = self.hand.step(i, closure, user, breaks, overflows)
        except Raised:
            wrong = "Raised"
        with broken(self.optimizers[i], breaks if wrong == "Raised" else ""):
            try:
                self.take_step(i, closure)
                error: Exception | None = None
            except (Raised, RuntimeError) as caught:
                error = caught
        self.user = None
        if wrong == "Raised":
            assert isinstance(error, Raised), error
        else:
            assert wrong in str(error) if wrong else error is None, (wrong, error)
        if error is not None:
            if getattr(self.optimizers[i], "grad_scale", 1) is None:
                delattr(self.optimizers[i], "grad_scale")  # torch has left it there, and fails because of it
            if not (breaks and self.hand.goes_on_after_a_failure and self.scaler is None):
                self.zero_all()
            elif self.rng.random() < 0.6:
                self.step(i)  # taken again

    def closure(self) -> Act:
        count = range(len(self.optimizers))
        acts: list[Act] = self.rng.choice(
            [[], [self.zero(count, self.rng.random() < 0.6), self.backward()], [self.backward()], [raise_]]
        )

        def closure(parameters: list[nn.Parameter]) -> None:
            for act in acts:
                act(parameters)

        return closure

    def take_step(self, i: int, closure: Act | None) -> None:
        if self.scaler is not None:
            self.scaler.step(self.optimizers[i])
        elif closure is None:
            self.optimizers[i].step()
        else:
            self.optimizers[i].step(lambda: closure(self.parameters))

    def cycle(self) -> None:
        """With a GradScaler, as its documentation says."""
        assert self.scaler is not None
        count = len(self.optimizers)
        self.both(self.zero(range(count), self.rng.random() < 0.6))
        for _ in range(self.rng.choice([1, 1, 2])):
            self.both(self.backward())
        # Without any gradient an optimizer does not step.
        live = [i for i, group in enumerate(self.hand.groups) if any(p.grad is not None for p in group)]
        overflows = {i: self.hand.overflows(i) for i in live}
        for i in live:
            self.scaler.unscale_(self.optimizers[i])
        for i in self.rng.sample(live, len(live)):
            if self.rng.random() < 0.85:
                self.step(i, overflows[i])
                if not self.hand.stepped and not any(p.grad is not None for p in self.copies):
                    break  # it has failed
        if live:
            self.scaler.update()

    def check(self) -> None:
        history, records = [*self.clipper.history], self.hand.records
        assert (self.clipper.state_dict()["steps"], self.clipper.loss) == (len(records), self.hand.loss)
        assert [(r.skipped, r.loss) for r in history] == [(r.skipped, loss) for r, loss in records]
        found = np.array([(r.total_norm, r.clip_coef, r.max_norm) for r in history])
        wanted = np.array([(r.total_norm, r.clip_coef, r.max_norm) for r, _ in records])
        if len(records):  # without a threshold, nothing was compared with it
            found[np.isnan(wanted[:, 2]), 2] = math.nan
        self.compare([found], [wanted])
        self.compare([numpy(p) for p in self.parameters], [numpy(p) for p in self.copies])

    def compare(self, found: list[Array], wanted: list[Array]) -> None:
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def run(self, events: int) -> None:
        count = len(self.optimizers)
        for _ in range(events):
            what = self.rng.random()
            if what < 0.03:
                self.renew()
            elif what < 0.07:
                self.save()
            elif what < 0.1:
                self.load()
            elif self.scaler is not None:
                self.cycle()
            elif what < 0.35:
                self.both(self.backward())
            elif what < 0.5:
                self.both(self.zero([self.rng.randrange(count)], self.rng.random() < 0.6))
            else:
                missing = min({*range(count)} - self.hand.stepped)
                self.step(self.rng.randrange(count) if self.rng.random() < 0.4 else missing)
            self.check()
            if not all(bool(p.isfinite().all()) for p in self.copies):
                return
        self.renew()
        if self.scaler is None:
            ours, theirs = ([p.grad for p in ps] for ps in (self.parameters, self.copies))
            assert [grad is None for grad in ours] == [grad is None for grad in theirs]
            self.compare(*([numpy(g) for g in grads if g is not None] for grads in (ours, theirs)))


def raise_(_: object) -> None:
    raise Raised


@pytest.mark.usefixtures("each_way_everywhere")
@pytest.mark.parametrize("seeds", [range(i, i + 15) for i in range(0, 75, 15)], ids=str)
def test_random_rounds_are_as_clipped_by_hand(seeds: range) -> None:
    run_each(Training, seeds, steps=40)
