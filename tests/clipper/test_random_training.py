"""A Clipper in random trainings: after each step everything is as after clipping by hand.

What a user does is drawn from a seed: accumulated backward passes, closures, a GradScaler, exceptions
anywhere, groups that are frozen, thawed, added and changed, gradients that the user's own code replaces in
the middle of a step, a run that is saved and continues elsewhere.  ``ByHand`` clips in float64; its optimizer
is two lines of SGD.  A run that fails prints what it did.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from by_hand import INF, LEARNED, Array, ByHand, Look, Raised, Result, assert_close, broken, numpy, run_each
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchclip import Clipper
from torchclip._core import gather
from torchclip._core.accelerator import AcceleratorBatch
from torchclip.history import Record

LR = 0.125


class Training:
    """One random training.

    Args:
        seed: the seed of everything that is drawn.
        say: is called with a description of each action.
    """

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        self.rng, self.say = random.Random(seed), say
        self.torch_rng = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice([torch.float32, torch.float32, torch.float64])
        # Torch's fused SGD with momentum cannot handle a parameter that is added later.
        self.momentum = self.rng.choice([0.0, 0.5])
        self.fused, self.named = not self.momentum, self.rng.random() < 0.5
        self.size = self.rng.choice([3.0, 3.0, 1e-7])  # of the gradients
        self.scope = self.rng.choice(["global", "group", "parameter"])
        self.order = self.rng.choice([2.0, 2.0, 1.0, INF])
        self.nonfinite = self.rng.choice(["propagate", "error", "skip", "zero"])
        numbers = [0.0, self.size / 2, 2 * self.size, INF, lambda step: self.size / (1 + step)]
        self.rule: Any = self.rng.choice([*numbers, *LEARNED])
        self.scaler = None
        if self.rng.random() < 0.4:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.unscaled = False
        # Whether a fused step decides on the device, as the host does not wait to hear that it is skipped.
        self.on_device = gather._local is AcceleratorBatch and self.fused
        self.during: Callable[[], None] | None = None  # what user code does in the middle of the next step
        self.skip_above = self.rng.choice([None, None, 3 * self.size])
        if self.nonfinite == "zero" and gather._local is AcceleratorBatch:
            self.skip_above = None  # elements become 0 before the device knows that the step is skipped
        self.hand = ByHand(self.rule, self.scope, self.nonfinite, self.order, self.skip_above)
        self.steps = self.records = 0
        self.over = self.again = False
        self.hook: RemovableHandle | None = None
        self.seen: list[Look] = []  # by a hook behind the clipper's
        self.optimizer = self.new_optimizer([[self.parameter() for _ in range(self.rng.randint(1, 3))]])
        for _ in range(self.rng.randint(0, 2)):
            self.add_group()
        self.clipper = self.new_clipper()
        say(f"{self.clipper!r} {self.dtype} fused={self.fused} scaler={self.scaler is not None} {self.size}")

    # The objects of a training

    def parameter(self) -> nn.Parameter:
        shape = self.rng.choice([(), (3,), (2, 4), (5, 1, 2), (0,)])
        return nn.Parameter(torch.randn(shape, generator=self.torch_rng, dtype=torch.float64).to(self.dtype))

    def given(self, parameters: list[nn.Parameter]) -> list[Any]:
        return [(f"p{id(p)}", p) for p in parameters] if self.named else parameters

    def new_optimizer(self, groups: list[list[nn.Parameter]]) -> torch.optim.SGD:
        return torch.optim.SGD(
            [{"params": self.given(group)} for group in groups], LR, self.momentum, fused=self.fused
        )

    def new_clipper(self) -> Clipper:
        rule = self.rule
        if isinstance(rule, str):
            rule = LEARNED[rule][0]()
        elif callable(rule):
            formula = rule

            def rule(step: int) -> float:
                self.user_code("max_norm")
                return float(formula(step))

        options: Any = {"scope": self.scope, "nonfinite": self.nonfinite, "norm_type": self.order}
        options["skip_above"] = self.skip_above
        on_clip = (lambda _: self.user_code("on_clip")) if self.rng.random() < 0.6 else None
        self.where = ["on_clip"] if on_clip else []
        if self.rule == "twice the mean":
            self.where.append("update")
        elif callable(self.rule):
            self.where.append("max_norm")
        if self.hook is not None:
            self.hook.remove()
        clipper = Clipper(self.optimizer, rule, on_clip=on_clip, **options)
        if self.rng.random() < 0.3:  # later user code that reads the gradients
            self.hook = self.optimizer.register_step_pre_hook(lambda *_: self.seen.append(self.look()))
        return clipper

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def divisor(self) -> float:
        """The current scale of the gradients."""
        return 1.0 if self.scaler is None or self.unscaled else self.scaler.get_scale()

    def look(self) -> Look:
        divisor = self.divisor
        return [
            [None if p.grad is None else (id(p.grad), numpy(p.grad) / divisor) for p in group["params"]]
            for group in self.optimizer.param_groups
        ]

    def owns(self) -> list[Any]:
        return [group.get("max_norm", "none") for group in self.optimizer.param_groups]

    # What a user does between steps

    def add_group(self) -> None:
        parameters = [self.parameter() for _ in range(self.rng.randint(1, 2))]
        group: dict[str, Any] = {"params": self.given(parameters)}
        if self.rng.random() < 0.3:
            group["max_norm"] = self.rng.choice([None, 0.1 * self.size, 2 * self.size])
        self.optimizer.add_param_group(group)
        self.say(f"add a group of {len(group['params'])}")

    def append_parameter(self) -> None:
        group = self.rng.choice(self.optimizer.param_groups)
        group["params"].append(self.parameter())
        self.say("append a parameter")

    def change_threshold(self) -> None:
        group = self.rng.choice(self.optimizer.param_groups)
        group.pop("max_norm", None)
        if self.rng.random() < 0.7:
            group["max_norm"] = self.rng.choice([None, 0.0, 0.1 * self.size, 2 * self.size])
        self.say(f"thresholds of the groups: {self.owns()}")

    def freeze_or_thaw(self) -> None:
        i = self.rng.randrange(len(self.optimizer.param_groups))
        group = self.optimizer.param_groups[i]["params"]
        frozen = group[0].requires_grad
        for p in group:
            p.requires_grad_(not frozen)
            p.grad = None if frozen else p.grad
        self.say(f"{'freeze' if frozen else 'thaw'} group {i}")

    def save_and_load(self) -> None:
        before, way = self.clipper, self.rng.choice([*["json"] * 6, "torch.save", "dcp"])
        state = json.loads(json.dumps(before.state_dict()))
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(before.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            if way == "dcp":
                dcp.save({"clipper": before}, checkpoint_id=folder, no_dist=True)
            self.renew_clipper()
            if way == "dcp":
                dcp.load({"clipper": self.clipper}, checkpoint_id=folder, no_dist=True)
            else:
                self.clipper.load_state_dict(state)
        self.say(f"save and load by {way}")

    def renew_clipper(self) -> None:
        """Make another one, for the same optimizer or for a new one."""
        if self.rng.random() < 0.5:
            self.clipper.detach()
        else:
            old = self.optimizer
            groups = [group["params"] for group in old.param_groups]
            self.optimizer = self.new_optimizer(
                [[nn.Parameter(p.detach().clone(), p.requires_grad) for p in group] for group in groups]
            )
            saved = copy.deepcopy(old.state_dict())
            if self.named:  # the optimizer has no name for an appended parameter
                for group, fresh in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
                    group["param_names"] = fresh["param_names"]
            self.optimizer.load_state_dict(saved)
            self.unscaled = False
        self.clipper = self.new_clipper()

    def ask_norms(self) -> None:
        norms = self.clipper.norms()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        expected = [self.hand.norm([numpy(grad)]) for grad in grads]
        np.testing.assert_allclose(np.sort([*norms.values()]), np.sort(expected), rtol=1e-6)

    def backward(self) -> None:
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            used = [p for p in self.parameters if p.requires_grad and self.rng.random() < 0.8]
            spoilt = self.rng.random() < 0.06
            terms = []
            for p in used:
                factors = torch.randn(p.shape, generator=self.torch_rng, dtype=torch.float64) * self.size
                if spoilt and p.numel():
                    bad = self.rng.choice([INF, -INF, math.nan])
                    factors.view(-1)[self.rng.randrange(p.numel())] = bad
                    self.say(f"a gradient of {bad}")
                    spoilt = self.rng.random() < 0.5
                terms.append((p * factors.to(self.dtype)).sum())
            if terms:
                loss = torch.stack(terms).sum()
                torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        present = [p for p in self.parameters if p.grad is not None and p.shape == (3,)]
        if len(present) > 1 and self.may_share and self.rng.random() < 0.1:
            present[0].grad = present[1].grad
            self.say("two parameters share a gradient")

    @property
    def may_share(self) -> bool:
        """Whether parameters may share a gradient.

        Torch's fused step with a scale divides it twice.  Of thresholds for each parameter only one learns.
        """
        learns = self.scope == "parameter" and self.rule in LEARNED
        return not learns and (self.scaler is None or not self.fused)

    # User code within a step

    def user_code(self, where: str) -> None:
        if self.during is not None and where == self.where_now:
            act, self.during = self.during, None
            act()

    def raise_(self) -> None:
        raise Raised

    def meddle(self) -> None:
        """Replace some gradients in a random way."""
        for p in self.parameters:
            if self.rng.random() < 0.5:
                continue
            factor = self.rng.choice([0.5, 1.0, 3.0] * 5 + [math.nan])
            if p.grad is None:
                if self.rng.random() < 0.5:
                    values = torch.randn(p.shape, generator=self.torch_rng, dtype=torch.float64)
                    p.grad = (values * (self.size * self.divisor)).to(self.dtype)
                continue
            way = self.rng.choice(
                ["replace", "data", "set_", "in place", "unseen", "none", "resize_", "share"]
            )
            self.say(f"  {way} a gradient of shape {tuple(p.shape)}, times {factor}")
            new = p.grad * factor
            if way == "replace":
                p.grad = new
            elif way == "data":
                p.grad.data = new
            elif way == "set_":
                p.grad.set_(new)  # type: ignore[call-overload]
            elif way == "in place":
                p.grad.mul_(factor)
            elif way == "unseen":  # which increments no version
                p.grad.data.mul_(factor)
            elif way == "none":
                p.grad = None
            elif way == "share" and self.may_share:
                others = [q for q in self.parameters if q.shape == p.shape]
                p.grad = self.rng.choice(others).grad
            elif p.grad.numel() and p.grad.untyped_storage().resizable():
                p.grad.resize_(1000).resize_(p.shape).copy_(new)

    # A step

    def step(self) -> None:
        """One step of a random kind, and its expected result."""
        ways = ["plain", "plain", "closure"] if self.scaler is None else ["scaler"]
        way, self.where_now = self.rng.choice(ways), self.rng.choice([*self.where, "nowhere"])
        raising = self.rng.random() < 0.15
        may_skip = self.skip_above is not None or self.nonfinite == "skip" or self.scaler is not None
        self.during = self.rng.choice([None, None if self.on_device and may_skip else self.meddle])
        if raising and self.where_now != "nowhere":
            self.during = self.raise_
        if self.during is not None and self.where_now != "nowhere":
            self.say(f"in {self.where_now}: {self.during.__name__}")
        before, after = [], []
        self.seen.clear()

        def look() -> None:
            before.append(self.look())

        def looking(act: Callable[[], None] | None) -> Callable[[], None] | None:
            def looked() -> None:
                assert act is not None
                act()
                after.append(self.look())

            return None if act is None else looked

        self.during = looking(self.during)
        values = [numpy(p) for p in self.parameters]
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.parameters]
        momenta = [None if buffer is None else numpy(buffer) for buffer in buffers]
        breaks = self.rng.choice(["hook", "step"]) if raising and self.where_now == "nowhere" else ""
        if way == "scaler" and not self.may_scale():
            self.zero_grad()
            return
        self.say(f"step, {way}{', ' + breaks + ' raises' if breaks else ''}")
        error: Exception | None = None
        with broken(self.optimizer, breaks):
            try:
                self.take_step(way, look)
            except (Raised, RuntimeError) as caught:
                error = caught
        self.check(before[-1] if before else None, after, values, momenta, error, way, bool(breaks))

    def may_scale(self) -> bool:
        """Whether there are gradients, without which a GradScaler does not step."""
        return any(p.grad is not None for p in self.parameters)

    def take_step(self, way: str, look: Callable[[], None]) -> None:
        if way == "closure":
            raises = self.rng.random() < 0.1

            def closure() -> float:
                self.zero_grad()
                self.backward()
                if raises:
                    self.raise_()
                look()
                return 1.0

            self.optimizer.step(closure)
        elif way == "plain":
            look()
            self.optimizer.step()
        else:
            assert self.scaler is not None
            if not self.unscaled and (not self.fused or self.rng.random() < 0.3):
                self.scaler.unscale_(self.optimizer)
                self.unscaled = True
            look()
            self.scaler.step(self.optimizer)

    def check(
        self,
        before: Look | None,
        after: list[Look],
        values: list[Array],
        momenta: list[Array | None],
        error: Exception | None,
        way: str,
        broke: bool,
    ) -> None:
        if before is None:  # the closure has raised
            assert isinstance(error, Raised)
            self.check_values(values, momenta, {})
            return
        finite = all(np.isfinite(grad[1]).all() for group in before for grad in group if grad is not None)
        by_scaler = way == "scaler" and not finite
        if by_scaler and not self.fused:  # its own skip, without a call of the optimizer
            assert error is None
            self.check_values(values, momenta, {})
            self.after_step(way)
            return
        asked: dict[str, float] = {}
        if by_scaler:
            total = self.hand.norm([g[1] for group in before for g in group if g is not None])
            expected: Result | None = Result(total, INF, 1.0, True, {})
        elif isinstance(error, Raised) and self.where_now in ("max_norm", "update"):
            expected = None  # before anything was learned
        else:
            expected = self.hand.judge(before, self.owns(), self.steps, asked)
            if expected is not None and after and not expected.skipped:
                expected = self.hand.judge(after[-1], self.owns(), self.steps, asked)
            elif expected is not None and after:  # skipped all the same
                changed = {grad[0]: grad[1] for group in after[-1] for grad in group if grad is not None}
                expected = expected._replace(grads=changed)
        if error is not None or broke:
            assert error is not None
            assert isinstance(error, Raised) or (expected is None and "non-finite" in str(error)), error
            self.check_values(values, momenta, {})
            assert len(self.clipper.history) == self.records
            if not broke and not after:
                self.check_grads({g[0]: g[1] for group in before for g in group if g is not None})
            if broke and getattr(self.optimizer, "grad_scale", 1) is None:
                delattr(self.optimizer, "grad_scale")  # torch has left it there, and fails because of it
            if broke or self.rng.random() < 0.7 or not isinstance(error, Raised):
                self.after_step(way)
                self.zero_grad()
            else:
                self.again = True
            return
        assert expected is not None
        grads = {} if expected.skipped else expected.grads
        self.check_values(values, momenta, grads)
        for look in self.seen if way != "closure" and not expected.skipped else ():
            self.check_look(look, expected.grads)
        self.records, self.steps = self.records + 1, self.steps + 1
        self.check_record(expected)
        if expected.skipped and not by_scaler:
            self.check_grads(expected.grads)
        elif not expected.skipped:
            self.unscaled = True
            self.check_grads(expected.grads)
        self.over = not all(np.isfinite(numpy(p)).all() for p in self.parameters)
        self.after_step(way)

    def after_step(self, way: str) -> None:
        if self.scaler is not None:
            self.scaler.update()
            self.unscaled = False
            self.zero_grad()
        elif self.rng.random() < 0.8:
            self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.rng.random() < 0.8)

    @property
    def close(self) -> Any:
        return {"rtol": 1e-5 if self.dtype == torch.float32 else 1e-9, "equal_nan": True}

    def check_record(self, expected: Result) -> None:
        assert len(self.clipper.history) == self.records
        record = self.clipper.history[-1]
        assert isinstance(record, Record)
        assert (record.step, record.skipped) == (self.steps - 1, expected.skipped)
        actual = [record.total_norm, record.clip_coef]
        np.testing.assert_allclose(actual, [expected.total_norm, expected.clip_coef], rtol=1e-5)
        if not math.isnan(expected.max_norm):  # which nothing was compared with
            np.testing.assert_allclose(record.max_norm, expected.max_norm, rtol=1e-5)

    def check_grads(self, expected: dict[int, Array]) -> None:
        self.check_look(self.look(), expected)

    def check_look(self, look: Look, expected: dict[int, Array]) -> None:
        found = {grad[0]: grad[1] for group in look for grad in group if grad is not None}
        assert found.keys() == expected.keys()
        assert_close(list(found.values()), [expected[key] for key in found], atol=1e-37, **self.close)

    def check_values(self, values: list[Array], momenta: list[Array | None], grads: dict[int, Array]) -> None:
        """By hand: SGD with momentum."""
        wanted = []
        for p, value, momentum in zip(self.parameters, values, momenta, strict=True):
            expected, grad = value, grads.get(id(p.grad))
            if grad is not None:
                buffer = grad if momentum is None else self.momentum * momentum + grad
                expected = value - LR * buffer
            wanted.append(expected)
            held = self.optimizer.state.get(p, {}).get("momentum_buffer")
            if grad is None or not self.momentum:
                assert (held is None) == (momentum is None)
                if held is not None and momentum is not None:
                    assert np.array_equal(numpy(held), momentum)
        found = [numpy(p) for p in self.parameters]
        assert_close(found, wanted, atol=self.close["rtol"] / 10, **self.close)

    def run(self, steps: int) -> None:
        between = [self.add_group, self.append_parameter, self.change_threshold, self.freeze_or_thaw]
        between += [self.save_and_load]
        for _ in range(steps):
            if not self.again:
                if self.rng.random() < 0.35:
                    self.rng.choice(between)()
                self.backward()
            self.again = False
            if self.rng.random() < 0.2:
                self.ask_norms()
            self.step()
            if self.over:
                return


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")  # of DCP
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.usefixtures("each_way_everywhere")
@pytest.mark.parametrize("seeds", [range(i, i + 15) for i in range(0, 75, 15)], ids=str)
def test_a_random_training_is_as_clipped_by_hand(seeds: range) -> None:
    run_each(Training, seeds, steps=20)
