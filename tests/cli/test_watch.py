"""``torchclip run`` records every optimizer's steps, and puts the clipping of a trial in place."""

import csv
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import torchclip
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.recording import recording
from torchclip.cli.run.report import report, sections
from torchclip.cli.run.trial import Trial
from torchclip.history.history import History

run_here = in_process.run_here


class Session:
    """All recorders, as in a run."""

    def __init__(self, **trial: Any) -> None:
        self._recording = recording(Trial(**trial))

    def __enter__(self) -> "Session":
        self.steps = self._recording.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._recording.__exit__(None, None, None)
        torchclip.uninstall()

    @property
    def optimizer(self) -> OptimizerRecord:
        (optimizer,) = self.steps.optimizers
        return optimizer

    @property
    def history(self) -> History:
        return self.optimizer.history

    def report(self) -> str:
        return report(self.steps, "1 s")


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def step(optimizer: torch.optim.Optimizer, *grads: Any) -> None:
    """One step with these gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.tensor(grad)
    optimizer.step()


def sgd(*parameters: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1.0, **options)


# Which calls measure


def test_a_script_that_does_not_clip_is_measured() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with Session() as session:
        step(optimizer, [3.0, 4.0])
        step(optimizer, [0.6, 0.8])
    assert [r.total_norm for r in session.history] == pytest.approx([5.0, 1.0])
    assert {r.max_norm for r in session.history} == {float("inf")}
    torch.testing.assert_close(w.data, torch.tensor([-3.6, -4.8]))
    assert "SGD: not clipped" in session.report()
    assert "2 steps: 0 clipped (0.0%)" in session.report()


def test_a_call_of_torchs_function_belongs_to_the_step_that_follows() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with Session() as session:
        for norm in (5.0, 0.5):
            w.grad = torch.tensor([0.0, norm])
            torch.nn.utils.clip_grad_norm_(iter([w]), 1.0)
            optimizer.step()
        step(optimizer, [0.0, 7.0])
    assert [r.total_norm for r in session.history] == [5.0, 0.5, 7.0]
    assert [r.clipped for r in session.history] == [True, False, False]
    text = " ".join(session.report().split())
    assert re.search(r"SGD: clipped to 1 by clip_grad_norm_ at \S*test_watch.py:\d+", text)


def test_value_clipping_is_a_ratio_of_norms() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with Session() as session:
        w.grad = torch.tensor([3.0, 4.0])
        torch.nn.utils.clip_grad_value_([w], 3.0)
        optimizer.step()
    (record,) = session.history
    assert record.total_norm == 5.0
    assert record.clip_coef == pytest.approx(18**0.5 / 5)
    torch.testing.assert_close(w.data, torch.tensor([-3.0, -3.0]))


def test_a_clipper_keeps_its_own_history() -> None:
    optimizer = sgd(weight(0.0, 0.0))
    with Session() as session:
        clipper = torchclip.Clipper(optimizer, 1.0)
        for _ in range(20):
            step(optimizer, [3.0, 4.0])
    assert session.history is clipper.history
    assert len(clipper.history) == 20
    text = session.report()
    assert "clipped to 1 by the Clipper at tests/cli/test_watch.py:" in " ".join(text.split())
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("kernel", [True, False])
def test_whatever_clips_for_some_of_the_steps_each_is_recorded_once(kernel: bool) -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with nullcontext() if kernel else torchclip.kernel.disabled(), Session() as session:
        for number in range(100):
            w.grad = torch.tensor([0.0, number + 1.0])
            if number == 70:
                torch.nn.utils.clip_grad_norm_([w], 10.0)
            if number == 80:
                optimizer.add_param_group({"params": [weight(0.0)]})
            optimizer.step()
        history = session.history
        step(optimizer, [0.0, float("inf")], [0.0])
        clipper = torchclip.Clipper(optimizer, 2.0)
        step(optimizer, [0.0, 5.0], [0.0])
        clipper.detach()
        step(optimizer, [0.0, 5.0], [0.0])
    assert [r.step for r in history] == list(range(101))
    assert [r.total_norm for r in history] == pytest.approx([*range(1, 101), float("inf")])
    assert [r.step for r in history if r.clipped] == [70]
    assert list(session.optimizer.nonfinite) == [100]
    assert [r.clipped for r in clipper.history] == [True, False]
    assert session.optimizer.steps == 103
    assert session.optimizer.layers.steps == [*range(0, 64, 4), 64, 96]


def test_one_call_for_two_optimizers_and_two_calls_for_one() -> None:
    first, second = weight(0.0, 0.0), weight(0.0, 0.0)
    of_first, of_second, of_both = sgd(first), sgd(second), sgd(first, second)
    with Session() as session:
        step(of_both, [0.0, 3.0], [0.0, 4.0])
        for optimizer in (of_first, of_second):
            optimizer.step()
        first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        torch.nn.utils.clip_grad_norm_([first, second], 1.0)
        of_first.step()
        of_second.step()
    both, one, two = session.steps.optimizers
    assert len(both.history) == 1
    assert [r.total_norm for r in one.history] == [3.0, 5.0]
    assert [r.total_norm for r in two.history] == [4.0, 5.0]


def test_a_call_for_each_of_many_parameters_belongs_to_their_step() -> None:
    weights = [weight(0.0) for _ in range(1600)]
    optimizer = sgd(*weights)
    with Session() as session:
        for _ in range(2):
            for w in weights:
                w.grad = torch.ones(1)
                torch.nn.utils.clip_grad_norm_([w], 0.5)
            optimizer.step()
    assert [r.total_norm for r in session.history] == [40.0] * 2


def test_of_two_optimizers_with_one_call_a_grad_scaler_leaves_out_the_step_of_one() -> None:
    first, second, frozen = weight(0.0), weight(0.0), weight(0.0)
    optimizers = sgd(first), sgd(second)
    with Session() as session:
        for value in (4.0, math.inf, 4.0):
            first.grad, second.grad = torch.tensor([3.0]), torch.tensor([value])
            torch.nn.utils.clip_grad_norm_([first, second, frozen], 1.0)
            optimizers[0].step()
            if math.isfinite(value):
                optimizers[1].step()
    one, two = ([(r.total_norm, r.skipped) for r in each.history] for each in session.steps.optimizers)
    assert one == [(5.0, False), (math.inf, False), (5.0, False)]
    assert two == [(5.0, False), (math.inf, True), (5.0, False)]


def test_two_calls_for_parts_of_an_optimizer_make_one_norm() -> None:
    first, second = weight(0.0, 0.0), weight(0.0, 0.0)
    optimizer = sgd(first, second)
    with Session() as session:
        for _ in range(2):
            first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
            torch.nn.utils.clip_grad_norm_([first], 1.0)
            torch.nn.utils.clip_grad_norm_([second], 2.0)
            optimizer.step()
    assert [r.total_norm for r in session.history] == [5.0, 5.0]
    assert [r.max_norm for r in session.history] == [1.0, 1.0]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_gets_the_arguments_that_the_optimizer_passes(by_name: bool) -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(lambda: closure(backward=True) if by_name else closure(True))

    w = weight(1.0)

    def closure(backward: bool) -> Tensor:
        w.grad = torch.full((1,), 3.0 if backward else 5.0)
        return w.detach().sum()

    with Session() as session:
        Twice([w], lr=0.1).step(closure)
    assert [r.total_norm for r in session.history] == [3.0]


def test_a_step_within_a_step_is_one() -> None:
    class Child(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    sgd(weight(0.0))  # its class has the hooks by now
    optimizer = Child([weight(0.0)], lr=1.0)
    with Session() as session:
        step(optimizer, [2.0])
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        step(optimizer, [2.0])
    assert [r.total_norm for r in session.history] == [2.0, 2.0]


def test_gradients_that_are_no_tensors_to_measure_do_not_end_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no norm of this")

    monkeypatch.setattr("torchclip.cli.run.steps.norm_of", fails)
    optimizer = sgd(weight(0.0))
    with Session() as session:
        step(optimizer, [2.0])
    assert "norms cannot be taken: RuntimeError: no norm of this" in session.report()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what cannot be compiled
def test_what_looks_on_is_not_compiled_with_a_step() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    compiled = torch.compile(optimizer.step, backend="eager")
    with Session() as session:
        for number in range(40):
            w.grad = torch.tensor([0.0, number + 1.0])
            compiled()
    assert [r.total_norm for r in session.history] == pytest.approx(list(range(1, 41)))


# The loss


def losses_of(history: History) -> list[float | None]:
    return [record.loss for record in history]


def test_the_loss_is_what_backward_is_called_on() -> None:
    w = weight(1.0)
    optimizer = sgd(w)
    with Session() as session:
        for factor in (2.0, 3.0):
            (w.sum() * factor).backward()  # with accumulation
            (w.sum() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
            w.data.fill_(1.0)
        w.grad = torch.autograd.grad(w.sum() * 5, w)[0].clone()
        optimizer.step()
        optimizer.zero_grad()
        (w * 7).backward(gradient=torch.ones(1))
        optimizer.step()
        w.sum().backward()
    assert losses_of(session.history) == [4.0, 6.0, None, None]
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert "loss: 4 at first, 6 over the last tenth" in session.report()


@pytest.mark.parametrize("own", [False, True])
def test_a_clipper_gets_the_loss_unless_the_script_gives_it(own: bool) -> None:
    w = weight(2.0)
    optimizer = sgd(w)
    with Session() as session:
        clipper = torchclip.Clipper(optimizer, 1.0)
        for _ in range(2):
            w.data.fill_(2.0)
            w.sum().backward()
            if own:
                clipper.loss = 7.0
            optimizer.step()
    assert losses_of(session.history) == [7.0 if own else 2.0] * 2


def own_scaler() -> torch.amp.GradScaler:
    class Scaler(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            if self._scale is None:
                self._lazy_init_scale_growth_tracker(outputs.device)
            return outputs * self._scale * 2

        def unscale_(self, optimizer: Any) -> None:
            super().unscale_(optimizer)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad /= 2

    return Scaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize(
    "new_scaler",
    [
        lambda: torch.amp.GradScaler("cpu", init_scale=1024.0),
        own_scaler,
    ],
)
def test_the_loss_is_without_a_grad_scalers_scale(new_scaler: Callable[[], torch.amp.GradScaler]) -> None:
    w = weight(2.0)
    optimizer = sgd(w)
    with Session() as session:
        scaler = new_scaler()
        for divided in (False, True):
            w.data.fill_(2.0)
            loss = scaler.scale(w.sum())
            (loss / 4 if divided else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scaler.scale(w.sum() * float("inf")).backward()  # the scaler skips this step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        w.data.fill_(3.0)
        scaler.scale(w.sum()).backward()
        scaler.step(optimizer)
    assert losses_of(session.history) == [2.0, 0.5, 3.0]


def test_losses_that_are_scaled_together_and_one_after_the_update_that_is_not_scaled() -> None:
    weights = [weight(2.0), weight(3.0)]
    optimizers = [sgd(each) for each in weights]
    with Session() as session:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses = scaler.scale([each.sum() for each in weights])
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            scaler.step(optimizer)
        scaler.update()
        weights[0].data.fill_(5.0)
        weights[0].sum().backward()
        optimizers[0].step()
    assert [losses_of(each.history) for each in session.steps.optimizers] == [[2.0, 5.0], [3.0]]


def test_the_loss_is_without_the_scale_of_the_scaler_for_ranks() -> None:
    w = weight(2.0)
    with Session() as session:
        ShardedGradScaler("cpu", init_scale=1024.0).scale(w.sum()).backward()
        sgd(w).step()
    assert losses_of(session.history) == [2.0]


@pytest.mark.parametrize("has_clipper", [False, True])
def test_of_a_step_with_several_closure_calls_the_first_loss_counts(has_clipper: bool) -> None:
    w = weight(4.0)
    optimizer = torch.optim.LBFGS([w], max_iter=5, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        if not has_clipper:
            torch.nn.utils.clip_grad_norm_([w], 1.0)
        return loss

    with Session() as session:
        if has_clipper:  # which has a record for each call
            torchclip.Clipper(optimizer, 1.0)
        for _ in range(3):
            w.data.fill_(4.0)
            optimizer.step(closure)
    first = {record.step: record for record in reversed(session.history)}
    assert [(r.total_norm, r.loss) for r in first.values()][::-1] == [(8.0, 16.0)] * 3
    assert has_clipper or len(session.history) == 3


# Non-finite and large gradients


@pytest.mark.parametrize("clips", [False, True])
def test_parameters_that_are_not_finite_are_named(clips: bool) -> None:
    with Session() as session:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for bad in (False, True):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            if bad:
                grad = model[1].bias.grad
                assert isinstance(grad, Tensor)
                grad.fill_(float("nan"))
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert session.optimizer.nonfinite == {1: ["1.bias"]}
    assert "not finite at step 1: 1.bias" in session.report()


def test_of_a_clipper_that_skips_parameters_are_named() -> None:
    with Session() as session:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torchclip.Clipper(optimizer, 1.0, nonfinite="skip")
        step(optimizer, [[1.0, float("inf")]], [1.0])
    assert session.optimizer.nonfinite == {0: ["weight"]}


def test_the_largest_layers_are_those_before_clipping() -> None:
    first, second = weight(0.0), weight(0.0)
    optimizer = sgd(first, second)
    with Session() as session:
        for _ in range(9):
            first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
            torch.nn.utils.clip_grad_norm_([first, second], 0.5)
            optimizer.step()
    _, steps, norms = session.optimizer.layers.read()
    assert steps == [0, 4, 8]
    np.testing.assert_allclose(norms, [[3.0, 4.0]] * 3, rtol=1e-5)
    assert "largest layers, by their share of the squared norm: parameter 1 (1) 64%" in " ".join(
        session.report().split()
    )
    (section,) = sections(session.steps).values()
    assert section.history.layers.steps == [0, 4, 8]


# Names


def names(session: Session, *modules: Any) -> list[str]:
    """The names of the parameters of some modules that one optimizer trains."""
    optimizer = sgd(*(p for module in modules for p in module.parameters()))
    step(optimizer, *[p.detach().tolist() for p in optimizer.param_groups[0]["params"]])
    return list(session.steps.optimizers[-1].names.values())


def test_parameters_have_the_names_that_their_modules_give_them() -> None:
    with Session() as session:
        net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
        assert names(session, net) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
        assert names(session, torch.compile(nn.DataParallel(net))) == names(session, net)
        first, second = nn.Linear(1, 1), nn.Linear(1, 1)
        two = ["Linear 1.weight", "Linear 1.bias", "Linear 2.weight", "Linear 2.bias"]
        assert names(session, first, second) == two
        assert names(session, nn.Linear(1, 1), nn.Bilinear(1, 1, 1))[2:] == [
            "Bilinear.weight",
            "Bilinear.bias",
        ]
        nn.Sequential(nn.Flatten(), first)  # which no longer exists
        assert names(session, first) == ["weight", "bias"]


def test_parameters_without_a_module_have_a_position_and_a_shape_or_the_optimizers_names() -> None:
    with Session() as session:
        step(
            sgd(weight(0.0), nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.tensor(0.0))),
            [1.0],
            [[1.0] * 3] * 2,
            1.0,
        )
        step(torch.optim.SGD([("a", weight(0.0))]), [1.0])
    first, second = session.steps.optimizers
    assert list(first.names.values()) == ["parameter 0 (1)", "parameter 1 (2×3)", "parameter 2 (a number)"]
    assert list(second.names.values()) == ["a"]


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(1, 1), nn.Linear(1, 1)


def test_optimizers_are_told_apart_by_what_they_train_or_by_numbers() -> None:
    with Session() as session:
        gan = Gan()
        for part in (gan.generator, gan.critic):
            names(session, part)
        for _ in range(2):
            step(torch.optim.Adam([weight(0.0)]), [1.0])
    assert list(sections(session.steps)) == ["generator (SGD)", "critic (SGD)", "Adam 1", "Adam 2"]


def test_optimizers_have_the_names_of_the_scripts_variables(run_here: in_process.Run) -> None:
    done = run_here(
        """
        import torch
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        opt_d, *others = [torch.optim.SGD([w], lr=0.1) for w in weights]
        for w, optimizer in zip(weights, [opt_d, *others]):
            w.sum().backward()
            optimizer.step()
        """
    )
    for label in ("opt_d (SGD)", "others[0] (SGD)", "others[1] (SGD)"):
        assert f"\n{label}: not clipped\n" in done.stderr


def test_optimizers_do_not_live_longer_for_being_recorded() -> None:
    with Session() as session:
        for _ in range(3):
            step(sgd(weight(0.0)), [1.0])
        assert [record.optimizer() for record in session.steps.optimizers] == [None] * 3


# Several optimizers


def two() -> tuple[list[nn.Parameter], list[torch.optim.SGD]]:
    weights = [weight(0.0, 0.0), weight(0.0, 0.0)]
    return weights, [sgd(each) for each in weights]


def both_losses(weights: list[nn.Parameter]) -> Tensor:
    return (weights[0] * torch.tensor([3.0, 0.0]) + weights[1] * torch.tensor([0.0, 4.0])).sum()


def test_optimizers_with_one_clipper_are_one_section() -> None:
    weights, optimizers = two()
    with Session() as session:
        torchclip.Clipper(optimizers, 1.0)
        both_losses(weights).backward()
        for optimizer in optimizers:
            optimizer.step()
    ((label, section),) = sections(session.steps).items()
    assert label == "SGD 1 and SGD 2"
    assert [record.total_norm for record in section.history] == [5.0]


def stepped(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("trial", [{}, {"max_norm": 2.0}])
def test_optimizers_that_step_in_backward_passes_are_one_section(trial: dict[str, Any]) -> None:
    weights, optimizers = two()
    with Session(**trial) as session:
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.register_post_accumulate_grad_hook(partial(stepped, optimizer))
        for _ in range(3):
            both_losses(weights).backward()
    ((label, section),) = sections(session.steps).items()
    assert label == "2 optimizers that step in backward passes"
    assert [(record.step, record.total_norm) for record in section.history] == [(0, 5.0), (1, 5.0), (2, 5.0)]
    torch.testing.assert_close(weights[1].data, torch.tensor([0.0, -6.0 if trial else -12.0]))
    assert "3 steps: " in session.report()


def test_a_trial_clips_each_optimizer_that_the_script_does_not_clip() -> None:
    weights, optimizers = two()
    with Session(max_norm=1.0) as session:
        for _ in range(2):
            both_losses(weights).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert [w.data.norm().item() for w in weights] == pytest.approx([2.0, 2.0])
    assert [section.history.summary().clipped for section in sections(session.steps).values()] == [2, 2]
    assert "SGD 2: clipped by --max-norm 1\n" in session.report()


def test_a_trial_changes_the_threshold_of_a_call_for_what_the_call_gets() -> None:
    weights, optimizers = two()
    with Session(max_norm=1.0):
        both_losses(weights).backward()
        torch.nn.utils.clip_grad_norm_(weights, 100.0, norm_type=1.0)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(
        [w.data for w in weights], [torch.tensor([-3 / 7, 0.0]), torch.tensor([0.0, -4 / 7])]
    )


def test_each_call_and_each_set_of_parameters_learns_a_threshold_of_its_own() -> None:
    weights, optimizers = two()
    with Session(threshold="percentile") as session:
        for _ in range(3):
            both_losses(weights).backward()
            for w, optimizer in zip(weights, optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(w, 100.0)
                optimizer.step()
                optimizer.zero_grad()
    assert [[r.max_norm for r in each.history] for each in session.steps.optimizers] == [[3.0] * 3, [4.0] * 3]


class Joint(torch.optim.Optimizer):
    """Steps several optimizers."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__([p for each in inner for group in each.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        for each in self.inner:
            each.step()


def test_steps_of_several_optimizers_within_another_one_are_one() -> None:
    weights = [weight(0.0), weight(0.0)]
    optimizer = Joint(*map(sgd, weights))
    with Session(max_norm=1.0) as session:
        for _ in range(2):
            step(optimizer, [3.0], [4.0])
    assert [r.total_norm for r in session.history] == [5.0, 5.0]
    torch.testing.assert_close(weights[1].data, torch.tensor([-1.6]))


def test_a_clipper_of_wrapped_optimizers_is_that_of_their_wrapper() -> None:
    weights = [weight(0.0), weight(0.0)]
    inner = [*map(sgd, weights)]
    clipper, optimizer = torchclip.Clipper(inner, 1.0), Joint(*inner)
    with Session() as session:
        for _ in range(2):
            step(optimizer, [3.0], [4.0])
    assert session.history is clipper.history
    assert session.optimizer.clipped_by == {"a Clipper": 2}


@pytest.mark.parametrize("fused", [False, True])
def test_a_trial_measures_and_clips_without_a_grad_scalers_scale(fused: bool) -> None:
    w = weight(0.0, 0.0)
    optimizer = torch.optim.SGD([w], lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Session(max_norm=1.0) as session:
        scaler.scale((w * torch.tensor([3.0, 4.0])).sum()).backward()
        scaler.step(optimizer)
    torch.testing.assert_close(w.data, torch.tensor([-0.6, -0.8]))
    assert [r.total_norm for r in session.history] == [5.0]
    assert session.optimizer.layers.norms.tolist() == [[5.0]]


def test_a_trial_clips_in_every_call_of_a_closure() -> None:
    w = weight(8.0)
    optimizer = torch.optim.LBFGS([w], max_iter=3, lr=1.0)
    seen = []

    def closure() -> Tensor:
        seen.append(w.item())
        w.grad = torch.full((1,), 100.0)
        return w.detach().sum()

    with Session(max_norm=1.0):
        optimizer.step(closure)
    assert -np.diff(seen) == pytest.approx([1.0] * (len(seen) - 1), rel=1e-4)


def test_a_trial_leaves_gradients_that_cannot_be_clipped() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with Session(max_norm=1.0) as session:
        for _ in range(2):
            w.grad = torch.ones(1).expand(2)  # whose elements share memory
            optimizer.step()
    torch.testing.assert_close(w.data, torch.full((2,), -2.0))
    assert "not clipped as asked: " in session.report()
    assert len(session.history) == 2


# Trials


def test_max_norm_takes_the_place_of_the_scripts_own_clipping() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with Session(max_norm=2.0) as session:
        w.grad = torch.tensor([3.0, 4.0])
        assert torch.nn.utils.clip_grad_norm_([w], 0.5) == 5.0
        torch.nn.utils.clip_grad_value_([w], 0.1)
        optimizer.step()
        torch.testing.assert_close(w.data, torch.tensor([-1.2, -1.6]))
        w.grad = torch.tensor([3.0, 4.0])
        torch.nn.utils.clip_grads_with_norm_([w], 0.1, torch.tensor(5.0))
        optimizer.step()
    torch.testing.assert_close(w.data, torch.tensor([-2.4, -3.2]))
    text = " ".join(session.report().split())
    assert "in place of the script's own clip_grad_norm_ and clip_grad_value_ and clip_grads" in text


@pytest.mark.parametrize(
    ("trial", "moved"), [({"max_norm": 2.0}, 2.0), ({"none": True}, 5.0), ({"threshold": "percentile"}, 5.0)]
)
def test_a_trial_takes_over_the_scripts_clipper(trial: dict[str, Any], moved: float) -> None:
    w = weight(0.0, 0.0)
    optimizer = torch.optim.SGD([{"params": [w], "max_norm": 0.1}], lr=1.0)
    with Session(**trial) as session:
        clipper = torchclip.Clipper(optimizer, 0.5)
        step(optimizer, [3.0, 4.0])
    assert clipper.last is not None
    assert clipper.last.total_norm == 5.0
    assert w.data.norm() == pytest.approx(moved)
    text = " ".join(session.report().split())
    assert "in place of the script's own Clipper" in text
    assert ("nothing was clipped (--none), in" in text) == ("none" in trial)


def test_of_a_threshold_for_each_parameter_no_range_is_said() -> None:
    optimizer = sgd(weight(0.0, 0.0), weight(0.0))
    with Session(threshold="adagc") as session:
        step(optimizer, [3.0, 4.0], [0.1])
    report = " ".join(session.report().split())
    assert "clipped by --threshold adagc, each parameter to a threshold of its own 1 step" in report


def test_a_clipper_made_after_the_first_step_replaces_the_trials() -> None:
    w = weight(0.0, 0.0)
    optimizer = sgd(w)
    with Session(max_norm=1.0) as session:
        step(optimizer, [3.0, 4.0])
        clipper = torchclip.Clipper(optimizer, 5.0)
        step(optimizer, [3.0, 4.0])
    assert clipper.last is not None
    assert clipper.last.max_norm == 1.0
    assert session.history is clipper.history


def test_an_optimizer_that_cannot_be_hashed_is_clipped() -> None:
    class Unhashable(torch.optim.SGD):
        __hash__ = None  # type: ignore[assignment]

    w = weight(0.0, 0.0)
    optimizer = Unhashable([w], lr=1.0)
    with Session(max_norm=1.0):
        for _ in range(2):
            step(optimizer, [3.0, 4.0])
    torch.testing.assert_close(w.data, torch.tensor([-1.2, -1.6]))


# The command

SCRIPT = """
import sys, torch
from torch import nn

torch.manual_seed(0)
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(60):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    if step == 9 and sys.argv[0] == "script.py":
        exec("".join(sys.argv[1:]))
print("done")
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(7)", 7, "until sys.exit(7)"),
        ("sys.exit()", 0, ""),
        ("1 / 0", 1, "until ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "until Ctrl-C"),
    ],
)
def test_the_report_is_of_what_ran(
    run_here: in_process.Run, tmp_path: Path, end: str, status: int, said: str
) -> None:
    done = run_here(SCRIPT, end, options=["--csv", "steps.csv"])
    assert (done.returncode, done.stdout) == (status, "")
    first, *_ = done.stderr[done.stderr.index("torchclip: report on a run of") :].splitlines()
    assert first.endswith(said)
    assert "10 steps: 0 clipped" in done.stderr
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 11


def test_files_are_written(run_here: in_process.Run, tmp_path: Path) -> None:
    files = ["--csv", "a.csv", "--plot", "a.svg", "--html", "a.html"]
    done = run_here(SCRIPT, options=[*files, "--max-norm", "1"])
    assert (done.returncode, done.stdout) == (0, "done\n")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(60))
    assert {row["optimizer"] for row in rows} == {"optimizer (SGD)"}
    assert {row["max_norm"] for row in rows} == {"1.0"}
    assert all(float(row["loss"]) > 0 for row in rows)
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "optimizer (SGD)" in page
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"script\.py, \d{4}-\d\d-\d\d \d\d:\d\d \S+, [\d.]+ m?s", text)
    assert "Clipped by --max-norm 1" in text
    assert "Largest layers, by their share of the squared norm: weight" in text
    assert "Norm and loss over steps" in text
    assert not re.search(r"(src|href)=\"http|@import|url\(http", page)


def test_advice_comes_after_what_clipping_did(run_here: in_process.Run) -> None:
    text = run_here(SCRIPT).stderr
    assert text.index("60 steps") < text.index("\nadvice\n")
    text = run_here(SCRIPT, options=["--max-norm", "1"]).stderr
    assert "\nadvice on --max-norm 1\n" in text


@pytest.mark.parametrize("columns", ["40", "60", "120"])
def test_the_report_fits_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with Session() as session:
        exec(SCRIPT, {"print": lambda _: None})
    text = session.report()
    assert "60 steps" in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(int(columns), 80)
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in text


def test_a_file_that_cannot_be_written_at_the_end_is_said(run_here: in_process.Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    done = run_here(SCRIPT, "import shutil; shutil.rmtree('a')", options=["--csv", "a/a.csv"])
    assert (done.returncode, done.stdout) == (2, "done\n")
    assert "torchclip run: error: argument --csv: No such file or directory: a/a.csv" in done.stderr
