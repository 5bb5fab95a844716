"""What a program meets that is wrong or goes wrong: arguments, Ctrl-C, ten thousand steps; and bugs found."""

import math
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits, last_of, with_gradients
from torch import nn

import torchclip
from torchclip import Clipper, Percentile, ZScore, kernel, reference
from torchclip.clipper import Scope
from torchclip.reference import Array

# Wrong arguments.  What the functions refuse of their numbers and tensors is in test_arguments.py.

MODEL = nn.Linear(2, 1)
WRONG: dict[str, Any] = {
    "None": None,
    "a string": "one",
    "bytes": b"1",
    "nan": math.nan,
    "below 0": -1.0,
    "a list": [1.0],
    "an empty list": [],
    "a dictionary": {},
    "a module": MODEL,
    "a class": nn.Linear,
    "a tensor": torch.ones(2),
    "an array": np.ones(2),
    "a complex number": 1j,
    "a truth value": True,
    "an object": object(),
    "inf": math.inf,
    "a fraction": 1.5,
}
NUMBERS = {"inf", "a fraction"}


def parameters() -> list[Any]:
    return with_gradients([torch.tensor([3.0, 4.0])])


def clipper(*arguments: Any, **options: Any) -> Clipper:
    return Clipper(torch.optim.SGD(parameters(), lr=0.1), *arguments, **options)


def arrays() -> list[Array]:
    return [np.array([3.0, 4.0])]


# What each is given, the argument that is named, and which of the wrong values are right for it.
ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str, set[str]]] = {
    "clip_grad_norm_": (
        lambda v: torchclip.clip_grad_norm_(parameters(), 1.0, error_if_nonfinite=v),
        "error_if_nonfinite",
        {"a truth value"},
    ),
    "get_total_norm": (
        lambda v: torchclip.get_total_norm([torch.ones(2)], error_if_nonfinite=v),
        "error_if_nonfinite",
        {"a truth value"},
    ),
    "clip_grad_norm_, group": (
        lambda v: torchclip.clip_grad_norm_(parameters(), 1.0, group=v),
        "group",
        {"None", "an empty list"},
    ),
    "get_total_norm, group": (
        lambda v: torchclip.get_total_norm([torch.ones(2)], group=v),
        "group",
        {"None", "an empty list"},
    ),
    "Percentile": (Percentile, "percentile", {"a fraction"}),
    "Percentile, window": (lambda v: Percentile(window=v), "window", {"None"}),
    "Percentile, warmup": (lambda v: Percentile(warmup=v), "warmup", set()),
    "Percentile, max_norm": (lambda v: Percentile(max_norm=v), "max_norm", NUMBERS),
    "Percentile, norm": (lambda v: Percentile().update(v), "norm", {*NUMBERS, "nan"}),
    "Percentile, state": (lambda v: Percentile().load_state_dict(v), "state", set()),
    "ZScore": (ZScore, "alpha", set()),
    "ZScore, threshold": (lambda v: ZScore(threshold=v), "threshold", {"a fraction"}),
    "ZScore, warmup": (lambda v: ZScore(warmup=v), "warmup", set()),
    "ZScore, clip_option": (lambda v: ZScore(clip_option=v), "clip_option", set()),
    "ZScore, skip": (lambda v: ZScore(skip_update_on_spike=v), "skip_update_on_spike", {"a truth value"}),
    "ZScore, max_norm": (lambda v: ZScore(max_norm=v), "max_norm", NUMBERS),
    "ZScore, norm": (lambda v: ZScore().update(v), "norm", {*NUMBERS, "nan"}),
    "ZScore, state": (lambda v: ZScore().load_state_dict(v), "state", set()),
    "Clipper": (lambda v: Clipper(v, 1.0), "optimizer", set()),
    "Clipper, max_norm": (clipper, "max_norm", {*NUMBERS, "a module"}),  # which is callable
    "Clipper, norm_type": (lambda v: clipper(1.0, norm_type=v), "norm_type", {*NUMBERS, "below 0"}),
    "Clipper, scope": (lambda v: clipper(1.0, scope=v), "scope", set()),
    "Clipper, nonfinite": (lambda v: clipper(1.0, nonfinite=v), "nonfinite", set()),
    "Clipper, group": (lambda v: clipper(1.0, group=v), "group", {"None", "an empty list"}),
    "Clipper, on_clip": (lambda v: clipper(1.0, on_clip=v), "on_clip", {"None", "a module", "a class"}),
    "Clipper, state": (lambda v: clipper(1.0).load_state_dict(v), "state", set()),
    "History": (torchclip.history.History, "maxlen", set()),
    "History, state": (lambda v: torchclip.history.History().load_state_dict(v), "state", set()),
    "global_norm": (reference.global_norm, "grads", {"an empty list"}),
    "global_norm, norm_type": (
        lambda v: reference.global_norm(arrays(), v),
        "norm_type",
        {*NUMBERS, "below 0"},
    ),
    "clip_grads": (lambda v: reference.clip_grads(v, 1.0), "grads", {"an empty list"}),
    "clip_grads, max_norm": (lambda v: reference.clip_grads(arrays(), v), "max_norm", NUMBERS),
    "clip_coefficient": (lambda v: reference.clip_coefficient(v, 1.0), "max_norm", NUMBERS),
    "clip_coefficient, total_norm": (
        lambda v: reference.clip_coefficient(1.0, v),
        "total_norm",
        {*NUMBERS, "nan", "below 0"},
    ),
    "clip_grads_with_norm": (
        lambda v: reference.clip_grads_with_norm(arrays(), 1.0, v),
        "total_norm",
        {*NUMBERS, "nan"},
    ),
    "clip_grad_value": (lambda v: reference.clip_grad_value(arrays(), v), "clip_value", NUMBERS),
    "clip_grad_norm_per_parameter": (
        lambda v: reference.clip_grad_norm_per_parameter(arrays(), 1.0, v),
        "norm_type",
        {*NUMBERS, "below 0"},
    ),
    "clip_grad_adaptive": (lambda v: reference.clip_grad_adaptive(v, arrays()), "weights", set()),
    "clip_grad_adaptive, grads": (
        lambda v: reference.clip_grad_adaptive(arrays(), v),
        "grads",
        set(),
    ),
    "clip_grad_adaptive, eps": (
        lambda v: reference.clip_grad_adaptive(arrays(), arrays(), 1.0, v),
        "eps",
        NUMBERS,
    ),
    "clip_per_example": (lambda v: reference.clip_per_example(v, 1.0), "grads", {"an empty list"}),
    "clip_per_example, max_norm": (lambda v: reference.clip_per_example(arrays(), v), "max_norm", NUMBERS),
    "percentile_thresholds": (
        reference.percentile_thresholds,
        "norms",
        {"a list", "an empty list", "an array"},
    ),
    "percentile_thresholds, percentile": (
        lambda v: reference.percentile_thresholds([1.0], v),
        "percentile",
        {"a fraction"},
    ),
    "percentile_thresholds, window": (
        lambda v: reference.percentile_thresholds([1.0], window=v),
        "window",
        {"None"},
    ),
    "percentile_thresholds, warmup": (
        lambda v: reference.percentile_thresholds([1.0], warmup=v),
        "warmup",
        set(),
    ),
    "percentile_thresholds, max_norm": (
        lambda v: reference.percentile_thresholds([1.0], max_norm=v),
        "max_norm",
        NUMBERS,
    ),
    "zscore_thresholds": (reference.zscore_thresholds, "norms", {"a list", "an empty list", "an array"}),
    "zscore_thresholds, alpha": (lambda v: reference.zscore_thresholds([1.0], v), "alpha", set()),
    "zscore_thresholds, threshold": (
        lambda v: reference.zscore_thresholds([1.0], threshold=v),
        "threshold",
        NUMBERS,
    ),
    "zscore_thresholds, warmup": (lambda v: reference.zscore_thresholds([1.0], warmup=v), "warmup", set()),
    "zscore_thresholds, clip_option": (
        lambda v: reference.zscore_thresholds([1.0], clip_option=v),
        "clip_option",
        set(),
    ),
    "zscore_thresholds, max_norm": (
        lambda v: reference.zscore_thresholds([1.0], max_norm=v),
        "max_norm",
        NUMBERS,
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_wrong_value_is_refused_by_the_name_of_its_argument(name: str) -> None:
    call, argument, right = ARGUMENTS[name]
    for kind, value in WRONG.items():
        if kind in right:
            call(value)
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        assert f"`{argument}` " in str(caught.value), (kind, str(caught.value))


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("argument", ["error_if_nonfinite", "group"])
def test_no_gradient_changes_where_an_argument_is_wrong(argument: str, kind: str) -> None:
    if kind in ARGUMENTS["clip_grad_norm_" if argument != "group" else "clip_grad_norm_, group"][2]:
        pytest.skip("is right")
    (parameter,) = parameters()
    before = bits(parameter.grad)
    with pytest.raises((TypeError, ValueError)):
        torchclip.clip_grad_norm_(parameter, 1.0, **{argument: WRONG[kind]})
    assert bits(parameter.grad) == before
    assert parameter.grad._version == 0


def test_install_and_uninstall_take_nothing() -> None:
    functions: list[Callable[..., object]] = [torchclip.install, torchclip.uninstall, torchclip.installed]
    for function in functions:
        with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given"):
            function(MODEL)


# Ctrl-C

INTERRUPTED = """
    import os, signal, sys, threading, time, torch, torchclip
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    torch.set_num_threads(1)
    grads = [torch.full((1 << 20,), 2.0) for _ in range(24)]
    parameters = [torch.nn.Parameter(grad, requires_grad=False) for grad in grads]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad
    def clip():
        torchclip.clip_grads_with_norm_(parameters, 0.5, 1.0 - 1e-6)  # multiplies by a half
    started = time.perf_counter()
    clip()
    takes = time.perf_counter() - started
    interrupted = scaled = 0
    for attempt in range(30):
        for grad in grads:
            grad.fill_(2.0)
        timer = threading.Timer(takes * attempt / 24, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            clip()
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
            timer.join()
        firsts = {float(value) for grad in grads for value in (grad.min(), grad.max())}
        assert firsts in ({1.0}, {2.0}), firsts
        scaled += firsts == {1.0}
    print(interrupted, scaled)
"""


@pytest.mark.skipif(kernel.status().startswith("off"), reason="promised where the kernel does it")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_ctrl_c_leaves_all_gradients_scaled_or_none() -> None:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    interrupted, scaled = map(int, output.split())
    assert interrupted >= 20
    assert scaled >= 5


# Ten thousand steps

STEPS = """
    import gc, os, sys, torch, torchclip
    from torchclip import kernel
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    parameters = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(64, 64)
    examples = [torch.ones(4, 8)]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    clipper = torchclip.Clipper(optimizer, 1.0)
    clipper.history = torchclip.history.History(maxlen=10)
    def steps(count):
        for step in range(count):
            optimizer.step()
            torchclip.clip_grad_norm_(parameters, 1.0)
            torchclip.clip_grad_value_(parameters, 1.0)
            torchclip.clip_grads_with_norm_(parameters, 1.0, torchclip.get_total_norm(parameters))
            if step % 10 == 0:  # they take longer
                torchclip.clip_grad_norm_per_parameter_(parameters, 1.0)
                torchclip.clip_grad_adaptive_(parameters)
                torchclip.clip_per_example(examples, 1.0)
        len(clipper.history)
        gc.collect()
        return len(gc.get_objects()), resident()
    steps(1_100)
    objects, memory = steps(100)
    objects_later, memory_later = steps(10_000)
    print(objects_later - objects, memory_later - memory)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("with_kernel", ["1", "0"])
def test_ten_thousand_steps_leave_no_growth(with_kernel: str) -> None:
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(STEPS)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TORCHCLIP_KERNEL": with_kernel},
    ).stdout
    objects, memory = map(int, output.split())
    assert objects < 50
    assert memory < 2 << 20, "48 KiB of gradients lost in each of 10,000 steps would be 480 MiB"


# Warnings


def test_nothing_warns_where_warnings_are_errors() -> None:
    script = """
        import torch, torchclip
        parameters = list(torch.nn.Linear(2, 2).parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torchclip.clip_grad_norm_(parameters, 1.0)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with torchclip.Clipper(optimizer, torchclip.Percentile()), torchclip.installed():
            optimizer.step()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, timeout=120)


# Found by stress.py

on_and_off = pytest.mark.usefixtures("kernel_on_and_off")


@on_and_off
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_coefficients_below_the_range_of_float32(dtype: torch.dtype) -> None:
    for clip in (torchclip.clip_grad_norm_, torchclip.clip_grad_adaptive_):
        parameters = with_gradients([torch.full((4,), 1e30).to(dtype)])
        clip(parameters, 1e-30) if clip is torchclip.clip_grad_norm_ else clip(parameters, 1e-30, 1.0)
        torch.testing.assert_close(
            parameters[0].grad.abs().double(), torch.full((4,), 5e-31).double(), rtol=4e-3, atol=0
        )


@on_and_off
@pytest.mark.filterwarnings("ignore:Sparse ")
def test_complex_compressed_gradients() -> None:
    gradient = torch.tensor([[3 + 0j, 0], [0, 4j]]).to_sparse_csr()
    parameter = nn.Parameter(gradient.clone())
    parameter.grad = gradient
    assert torchclip.clip_grad_norm_(parameter, 1.0) == 5
    torch.testing.assert_close(gradient.values(), torch.tensor([0.6 + 0j, 0.8j]))


@on_and_off
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_steps_write_nothing_between_the_elements_of_a_gradient(name: str) -> None:
    memory = torch.full((100, 1000), 7.0)
    parameter = nn.Parameter(torch.zeros(100, 500))
    parameter.grad = memory[:, ::2]
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, fused=True)
    Clipper(optimizer, 1.0)
    optimizer.step()
    assert memory[:, 1::2].eq(7).all()
    assert float(torchclip.get_total_norm(parameter.grad)) == pytest.approx(1.0, rel=1e-6)


@on_and_off
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_an_empty_gradient_has_no_part_in_a_norm_of_negative_order(scope: Scope) -> None:
    groups = [
        {"params": with_gradients([gradient])} for gradient in (torch.tensor([2.0, 3.0]), torch.zeros(0))
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clipper = Clipper(optimizer, 1.0, norm_type=-math.inf, scope=scope)
    optimizer.step()
    assert last_of(clipper).total_norm == 2


def test_the_twins_do_not_stumble_over_inf() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sums, clipped = reference.clip_per_example([np.array([[math.inf, 1.0], [3.0, 4.0]])], 1.0)
        assert np.isnan(sums[0][0])
        assert clipped == 2
        gradient = np.zeros(2)
        reference.clip_grad_adaptive([np.array([math.inf, 1.0])], [gradient], clip_factor=0.0)
        assert np.isnan(gradient).all()
