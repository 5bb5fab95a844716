"""Interrupts and saving at any line of a step, other threads, swapped tensors, optimizers that count."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from clipper_helpers import Net, grad_norms, sgd
from helpers import last_of, with_gradients
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

import torchclip
from torchclip import Clipper, Percentile, RollingSigma
from torchclip.clipper.skip_above import InARow

_FOLDER = str(Path(torchclip.clipper.__file__).parent)
INF = float("inf")


@contextmanager
def at_line(number: int, act: Callable[[], object]) -> Iterator[list[int]]:
    """Calls a function before the line with this number, of those that run in torchclip.clipper.

    Yields:
        A list with the number of lines that have run so far.
    """
    count = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_FOLDER):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number + 1:
                sys.settrace(None)
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def interrupt() -> None:
    raise KeyboardInterrupt


class Run:
    """A small training in one configuration of a Clipper."""

    def __init__(self, options: dict[str, Any], fused: bool, scaled: bool, several: bool) -> None:
        self.weights = [nn.Parameter(torch.zeros(2)) for _ in range(1 + several)]
        self.optimizers = [SGD([weight], lr=1.0, fused=fused) for weight in self.weights]
        self.clipper = Clipper(self.optimizers, **{"max_norm": 1.0, **options})
        self.scaler = GradScaler("cpu", init_scale=4.0, enabled=scaled)

    def backward(self, size: float) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        factors = torch.tensor([0.6, 0.8]) * size
        self.scaler.scale(torch.stack([(w * factors).sum() for w in self.weights]).sum()).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        for optimizer in self.optimizers:
            if len(self.optimizers) > 1:
                self.scaler.unscale_(optimizer)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def forget_scaler(self) -> None:
        """Remove what torch leaves without a Clipper, too, if a GradScaler's step is interrupted."""
        self.clipper.state_dict()
        for optimizer in self.optimizers:
            if (left := vars(optimizer).pop("grad_scale", None)) is not None:
                assert float(left) == 4.0  # its scale, without a coefficient
                assert float(vars(optimizer).pop("found_inf")) == 0.0
        self.scaler = GradScaler("cpu", init_scale=4.0)

    def values(self) -> list[list[float]]:
        return [weight.tolist() for weight in self.weights]

    def assert_clean(self) -> None:
        for optimizer in self.optimizers:
            assert not {"grad_scale", "found_inf", "zero_grad"} & vars(optimizer).keys()


CONFIGURATIONS: dict[str, tuple[dict[str, Any], bool, bool, bool, float]] = {
    "number": ({}, False, False, False, 5.0),
    "percentile": ({"max_norm": Percentile(100, max_norm=1.0)}, False, False, False, 5.0),
    "fused": ({}, True, False, False, 5.0),
    "skip": ({"nonfinite": "skip"}, False, False, False, INF),
    "skip fused": ({"nonfinite": "skip"}, True, False, False, INF),
    "skip_above": ({"skip_above": 2.0, "max_skips": 3}, False, False, False, 5.0),
    "layers": ({"layers_every": 1, "on_clip": lambda _: None}, False, False, False, 5.0),
    "several": ({}, False, False, True, 5.0),
    "scaler": ({}, False, True, False, 5.0),
    "fused with a scaler": ({}, True, True, False, 5.0),
}
each_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


def made(name: str) -> tuple[Run, float]:
    options, fused, scaled, several, size = CONFIGURATIONS[name]
    return Run(options, fused, scaled, several), size


def lines_of(name: str) -> int:
    run, size = made(name)
    run.backward(size)
    with at_line(sys.maxsize - 1, interrupt) as count:
        run.step()
    assert count[0] > 20
    return count[0]


@pytest.mark.usefixtures("small_ones_too")
@each_configuration
@pytest.mark.parametrize("then", ["state_dict", "step"])
def test_an_interrupt_at_any_line_of_a_step_leaves_nothing_behind(name: str, then: str) -> None:
    for line in range(lines_of(name)):
        run, size = made(name)
        run.backward(size)
        with at_line(line, interrupt), pytest.raises(KeyboardInterrupt):
            run.step()
        if then == "state_dict":
            state = run.clipper.state_dict()
            assert state["steps"] == len(run.clipper.history), line
            assert all(weight.grad is not None for weight in run.weights), line
        if run.scaler.is_enabled():
            run.forget_scaler()
        elif then == "state_dict":
            run.assert_clean()
        before, steps = run.values(), len(run.clipper.history)
        for number in range(2):
            run.backward(0.5)
            run.step()
            run.assert_clean()
            moved = [torch.tensor(a) - torch.tensor(b) for a, b in zip(run.values(), before, strict=True)]
            expected = [torch.tensor([-0.3, -0.4]) * (number + 1)] * len(moved)
            torch.testing.assert_close(moved, expected)
            total = 0.5 * len(moved) ** 0.5
            assert last_of(run.clipper).total_norm == pytest.approx(total), line
            assert last_of(run.clipper).clip_coef == 1.0, line
        assert [r.step for r in run.clipper.history] == [*range(len(run.clipper.history))], line
        assert len(run.clipper.history) - steps in ((2,) if steps else (2, 3)), line
        assert run.clipper.state_dict()["steps"] == len(run.clipper.history)


@pytest.mark.usefixtures("small_ones_too")
@each_configuration
def test_a_state_at_any_line_has_as_many_records_as_steps_and_can_be_loaded(name: str) -> None:
    for line in range(lines_of(name)):
        run, size = made(name)
        run.backward(0.5)
        run.step()
        run.backward(size)
        states: list[Any] = []

        def save(run: Run = run, states: list[Any] = states) -> None:
            states.append(run.clipper.state_dict())

        with at_line(line, save):
            run.step()
        assert len(run.clipper.history) == 2, line
        if not states:  # a later step has fewer lines
            continue
        (state,) = states
        records = state["history"]["records"]
        assert len(records["step"]) == state["steps"] in (1, 2), line
        for learned in state["thresholds"].values():
            assert len(learned["norms"]) == state["steps"], line
        assert state["skips"]["skip_above"] == (state["steps"] == 2 and name == "skip_above"), line
        assert state["skips"]["nonfinite"] == 0 or state["steps"] == 2, line
        fresh, _ = made(name)
        fresh.clipper.load_state_dict(json.loads(json.dumps(state)))
        assert fresh.clipper.state_dict() == state
        run.assert_clean()


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_other_threads_end_no_step_and_see_whole_states(policy: Any) -> None:
    """While a step waits in the middle, a second thread asks for everything."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=1.0)
    clipper = Clipper(
        optimizer,
        Percentile(50),
        nonfinite=policy,
        skip_above=RollingSigma(window=3, warmup=2),
        layers_every=1,
    )
    found: list[Any] = []

    def ask() -> None:
        state = clipper.state_dict()
        with pytest.raises(RuntimeError, match="during a step"):
            clipper.detach()
        clipper.norms()
        found.append((state, clipper.last, len(clipper.history), {**clipper.thresholds}))

    def in_another_thread(*_: Any) -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    optimizer.register_step_pre_hook(in_another_thread)  # behind the Clipper's
    for step in range(6):
        weight.grad = torch.tensor([3.0, INF if step == 4 else 4.0])
        optimizer.step()
        state, last, length, thresholds = found[-1]
        assert (state["steps"], length) == (step, step)
        assert len(state["history"]["records"]["step"]) == len(state["history"]["layers"]["steps"]) == step
        taken = step - (policy == "skip" and step > 4)
        assert len(state["thresholds"]["all"]["norms"]) == taken - (policy != "skip" and step > 4)
        assert (last is None) == (step == 0)
        assert [*thresholds] == ["all"]
    assert len(found) == len(clipper.history) == 6
    assert "zero_grad" not in vars(optimizer)


@pytest.mark.parametrize(
    "options", [{}, {"model": True}, {"layers_every": 1}, {"max_norm": Percentile(), "scope": "parameter"}]
)
@pytest.mark.parametrize("several", [False, True])
def test_a_module_can_move_where_torch_swaps_tensors(options: dict[str, Any], several: bool) -> None:
    model = Net()
    halves = [[model.inner.weight], [model.outer.weight, model.embedding.weight]]
    optimizers = [SGD(half, lr=0.1) for half in (halves if several else [halves[0] + halves[1]])]
    given = {"max_norm": 1.0, **options} | ({"model": model} if "model" in options else {})
    clipper = Clipper(optimizers, **given)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for step, dtype in enumerate([torch.float64, torch.float32]):
            model.zero_grad()
            loss = ((model(torch.tensor([0, 1])) - 1.0) ** 2).sum()
            loss.backward()
            clipper.loss = float(loss.detach())
            for optimizer in optimizers:
                optimizer.step()
            clipper.norms()
            del loss
            model.to(dtype)
            assert [p.dtype for p in model.parameters()] == [dtype] * 3
            assert len(clipper.history) == step + 1
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class Counting(SGD):
    """Counts its steps in its parameter groups, as optimizers without a schedule do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group.setdefault("weights", []).append(group["lr"])
            group.setdefault("sums", torch.zeros(1)).add_(1.0)
        return super().step(closure)


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"skip_above": 100.0}])
def test_a_skipped_step_changes_nothing_that_an_optimizer_counts_in_its_groups(options: Any) -> None:
    groups = []
    for sizes in ([1.0, INF, 2.0, INF], [1.0, 2.0]):
        optimizer = Counting(with_gradients([torch.ones(2)]), lr=0.1)
        _clipper = Clipper(optimizer, 1.0, **options)
        for size in sizes:
            optimizer.param_groups[0]["params"][0].grad = torch.tensor([size, 1.0])
            optimizer.step()
        groups.append({key: str(value) for key, value in optimizer.param_groups[0].items()})
    assert groups[0] == groups[1]


def test_max_norm_is_read_and_set() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], lr=0.0)
    (weight,) = optimizer.param_groups[0]["params"]
    clipper = Clipper(optimizer, 1.0)
    assert clipper.max_norm == 1.0
    threshold, rule = Percentile(0, max_norm=3.0), torchclip.Value(0.5)
    for max_norm, norm in ((2.0, 2.0), (lambda step: 1.5, 1.5), (threshold, 3.0), (rule, 0.5**0.5), (1, 1.0)):
        clipper.max_norm = max_norm
        assert clipper.max_norm == max_norm
        assert [*clipper.thresholds] == ["all"] * (max_norm is threshold)
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert grad_norms(optimizer) == pytest.approx([norm])
    for wrong in (-1.0, "abc", Percentile, None):
        with pytest.raises((TypeError, ValueError), match="`max_norm`"):
            clipper.max_norm = wrong  # type: ignore[assignment]
        assert clipper.max_norm == 1.0
    assert len(clipper.history) == 5


def test_a_skipped_step_counts_though_its_end_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = sgd([torch.tensor([INF])])
    clipper = Clipper(optimizer, 1.0, nonfinite="skip", max_skips=2)

    with monkeypatch.context() as patch:
        patch.setattr(InARow, "end", lambda _: interrupt())
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert clipper.state_dict()["skips"]["nonfinite"] == 2
    with pytest.raises(RuntimeError, match=r"(?s)2 steps in a row .*param_groups\[0\]\['params'\]\[0\]"):
        optimizer.step()
    assert len(clipper.history) == 2
