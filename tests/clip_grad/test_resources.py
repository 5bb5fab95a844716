"""What calls leave behind: Ctrl-C in the middle of one, thousands of steps."""

import os
import subprocess
import sys
import textwrap

import pytest

from torchclip import kernel

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


@pytest.mark.slow
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
    parameters = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(16, 16)
    examples = [torch.ones(4, 8)]
    optimizer = torch.optim.SGD(parameters, lr=0.0, fused=True)
    clipper = torchclip.Clipper(optimizer, 1.0, nonfinite="skip")
    clipper.history = torchclip.history.History(maxlen=10)
    def steps(count):
        for step in range(count):
            parameters[0].grad.fill_(float("nan") if step % 7 == 0 else 1.0)
            optimizer.step()
            parameters[0].grad.fill_(1.0)
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
    steps(300)
    objects, memory = steps(100)
    objects_later, memory_later = steps(1_000)
    print(objects_later - objects, memory_later - memory)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("with_kernel", ["1", "0"])
def test_thousands_of_steps_leave_no_growth(with_kernel: str) -> None:
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
    assert memory < 2 << 20, "3 KiB of gradients lost in each of 1,000 steps would be 3 MiB"
