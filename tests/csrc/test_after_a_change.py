"""What the kernel does after it has changed gradients."""

import contextlib
import subprocess
import sys

import pytest
import torch
from helpers import last_of, with_gradients

import torchclip
from torchclip import kernel
from torchclip.clipper import Nonfinite

pytestmark = pytest.mark.skipif(not kernel.status().startswith("active"), reason="the kernel is off")

FINALIZER_REPLACES_A_GRADIENT = """
import gc, torch, torchclip
torch.set_num_threads(1)
parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(40)]
large = torch.nn.Parameter(torch.zeros(400_000))
parameters.append(large)
optimizer = torch.optim.SGD(parameters, lr=0.1)
clipper = torchclip.Clipper(optimizer, torchclip.{rule})
def backward():
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
for _ in range(3):
    backward()
    optimizer.step()
backward()
done = []
class Finalizer:
    def __init__(self):
        self.me = self
    def __del__(self):
        if done:
            return
        if large.grad[0].item() == 3.0:  # not clipped yet: until the next collection
            Finalizer()
            return
        done.append(1)
        large.grad.data = torch.full_like(large, 7.0)
gc.collect(); gc.disable(); gc.freeze()
Finalizer()
gc.set_threshold(1); gc.enable()
optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets an option of the C library")
@pytest.mark.parametrize("rule", ["Value(0.5)", "BlockRMS(0.5)"])
def test_memory_is_read_again_after_autograd_was_told_of_a_change(rule: str) -> None:
    # So that freed memory is returned to the system at once.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}
    program = FINALIZER_REPLACES_A_GRADIENT.format(rule=rule)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
def test_a_weight_that_is_not_finite_makes_no_other_step_of_an_adaptive_one(nonfinite: Nonfinite) -> None:
    records = []
    for context in (contextlib.nullcontext, kernel.disabled):
        spoilt, weight = with_gradients(
            [torch.ones(2, 2) for _ in range(2)], [torch.ones(2, 2) for _ in range(2)]
        )
        spoilt.data[0, 0] = float("nan")
        optimizer = torch.optim.SGD([spoilt, weight], lr=0.1)
        clipper = torchclip.Clipper(optimizer, torchclip.Adaptive(0.01), nonfinite=nonfinite)
        with context():
            optimizer.step()
        record = last_of(clipper)
        records.append((record.total_norm, record.skipped, weight.tolist()))
    assert repr(records[0]) == repr(records[1])
