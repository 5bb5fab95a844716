"""The compiled extension itself: what cannot be seen through the public functions.

CONTRIBUTING.md says how to run these tests under the sanitizers.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits, instruction_sets, randn, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchclip
from torchclip import kernel, reference
from torchclip._core.batch import Facts

_kernel = pytest.importorskip("torchclip._kernel")
if kernel.status().startswith("off"):
    pytest.skip(f"the kernel is {kernel.status()}", allow_module_level=True)

REAL = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*REAL, torch.complex64, torch.complex128]
ORDERS = [1.0, 2.0, math.inf]
SPECIAL = [0.0, -0.0, 1.0, -3.0, 1e-3, 300.0, 1e20, -1e30, 3e38, 1e-25, 1e-40, 6e-8]
SPECIAL += [1e200, -1.7e308, 1e-200, 5e-324]
NONFINITE = [math.inf, -math.inf, math.nan]
ABSENT = -1.0  # the norm of no elements
GUARD = 7.25  # around the elements of a view; must still be there afterwards


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    """The instruction set is the module's, not the test's."""
    yield
    _kernel.select(None)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy in float64 or complex128, which hold every value of every dtype."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy().copy()


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 numbers rounded once, half to even, to what ``dtype`` can hold."""
    if dtype == torch.float64:
        return values
    info = torch.finfo(dtype)
    digits = round(-math.log2(info.eps)) + 1
    _, exponent = np.frexp(values)
    exponent = np.maximum(exponent, round(math.log2(info.tiny)) + 1)
    with np.errstate(invalid="ignore", over="ignore"):
        result = np.ldexp(np.rint(np.ldexp(values, digits - exponent)), exponent - digits)
        result = np.where(np.isfinite(values), result, values)
        return np.where(np.abs(result) > info.max, np.copysign(np.inf, values), result)


def scaled(values: np.ndarray, factor: float | np.float32, dtype: torch.dtype) -> np.ndarray:
    """The products, rounded to ``dtype``; formed in float32 for all but doubles, if it holds the factor."""
    if np.iscomplexobj(values):
        parts = values.reshape(-1).view(np.float64)
        real = {torch.complex64: torch.float32, torch.complex128: torch.float64}[dtype]
        return scaled(parts, factor, real).view(np.complex128).reshape(values.shape)
    with np.errstate(invalid="ignore", under="ignore"):
        if dtype != torch.float64 and factor >= torch.finfo(torch.float32).tiny:
            values, factor = values.astype(np.float32), np.float32(factor)
        return rounded((values * factor).astype(np.float64), dtype)


@st.composite
def views(draw: st.DrawFn, dtype: torch.dtype, nonfinite: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor without gaps, its axes in any order, and the memory around it."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 40]), max_size=4))
    while math.prod(sizes) > 4000:
        sizes.pop()
    offset, after = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    memory = torch.full((offset + math.prod(sizes) + after,), GUARD, dtype=dtype)
    view = memory[offset : offset + math.prod(sizes)].view(sizes)
    view = view.permute(draw(st.permutations(range(len(sizes)))))
    info = torch.finfo(dtype)
    pool = [v for v in SPECIAL if abs(v) <= info.max] + (NONFINITE if nonfinite else [])
    values = st.one_of(st.sampled_from(pool), st.floats(-4, 4))
    cycle = draw(st.lists(values, min_size=1, max_size=40))
    parts = 2 if dtype.is_complex else 1
    numbers = np.resize(np.array(cycle), view.numel() * parts)
    numbers = numbers.view(np.complex128) if dtype.is_complex else numbers
    view.copy_(torch.from_numpy(numbers.copy()).view(view.shape))
    return view, memory


def assert_guards(view: torch.Tensor, memory: torch.Tensor) -> None:
    """Nothing but the view's own elements was written."""
    untouched = torch.ones(memory.shape, dtype=torch.bool)
    untouched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert bool((memory[untouched] == GUARD).all())


def assert_same_norm(got: float, wanted: float) -> None:
    assert got == pytest.approx(wanted, rel=1e-12, abs=1e-320, nan_ok=True)


def twin(arrays: list[np.ndarray], order: float) -> float:
    """The reference's norm, or the kernel's answer for no elements."""
    return reference.global_norm(arrays, order) if any(a.size for a in arrays) else ABSENT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30)
@given(data=st.data(), order=st.sampled_from(ORDERS), threads=st.integers(1, 4), nonfinite=st.booleans())
def test_norms_agree_with_the_reference(
    dtype: torch.dtype, data: st.DataObject, order: float, threads: int, nonfinite: bool
) -> None:
    made = data.draw(st.lists(views(dtype, nonfinite), max_size=4))
    tensors = [view for view, _ in made]
    _kernel.select(data.draw(st.sampled_from(instruction_sets())))
    torch.set_num_threads(threads)
    batch = _kernel.tensors(tensors)
    assert list(batch.rest) == []
    arrays = [as_array(t) for t in tensors]
    assert_same_norm(batch.norm(order), twin(arrays, order))
    for got, array in zip(batch.norms(order), arrays, strict=True):
        assert_same_norm(got, twin([array], order))


def clamped(values: np.ndarray, limit: float, dtype: torch.dtype) -> np.ndarray:
    """The reference's numbers; torch and NumPy round the limit to the dtype, too."""
    result = values.copy()
    reference.clip_grad_value([result], float(rounded(np.array(limit), dtype)))
    return result


FACTORS = st.one_of(st.floats(0, 1), st.sampled_from([0.1, 1e-5, 1e-30, 1e-100, math.nan, 5e-324]))
LIMITS = st.sampled_from([0.0, 1e-8, 0.1, 1.0, 2.5, 1e5, math.inf])
# How a batch is changed by a number, what each element is then, and the numbers.
CHANGES: dict[str, tuple[Callable[[Any, float], None], Callable[..., np.ndarray], Any]] = {
    "scale_": (lambda batch, factor: batch.scale_(factor), scaled, FACTORS),
    "clamp_": (lambda batch, limit: batch.clamp_(limit), clamped, LIMITS),
    "zero_nonfinite_": (
        lambda batch, _: batch.zero_nonfinite_(),
        lambda values, *_: np.where(np.isfinite(values), values, 0),
        st.just(0.0),
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in CHANGES for d in (REAL if n == "clamp_" else DTYPES)], ids=str
)
@settings(max_examples=30)
@given(data=st.data(), threads=st.integers(1, 4))
def test_a_change_rounds_once_and_touches_nothing_else(
    name: str, dtype: torch.dtype, data: st.DataObject, threads: int
) -> None:
    change_, expected_of, numbers = CHANGES[name]
    number = data.draw(numbers)
    made = data.draw(st.lists(views(dtype), max_size=3))
    _kernel.select(data.draw(st.sampled_from(instruction_sets())))
    wanted = [expected_of(as_array(view), number, dtype) for view, _ in made]
    torch.set_num_threads(threads)
    change_(_kernel.tensors([view for view, _ in made]), number)
    for (view, memory), expected in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(as_array(view), expected)
        assert_guards(view, memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "factor",
    # The first two make products that are ties in float32, but not exactly; the last but one is no float32.
    [0.5389344076221869, 0.011292205339423544, 0.1, 1 / 3, 257 / 512, 0.9999999, 1e-4, 3e-39, math.nan],
)
def test_every_16_bit_number_is_scaled_right(dtype: torch.dtype, factor: float) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = bits.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    wanted = scaled(as_array(every), factor, dtype)
    for name in instruction_sets():
        _kernel.select(name)
        tensor = every.clone()
        _kernel.tensors([tensor]).scale_(factor)
        np.testing.assert_array_equal(as_array(tensor), wanted)


def test_which_tensors_are_taken() -> None:
    class Subclass(torch.Tensor):
        pass

    flat = torch.randn(12)
    taken = [
        flat,
        nn.Parameter(torch.randn(2)),
        torch.randn(3, requires_grad=True) * 2,
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.empty(0, 3),
        torch.tensor(1.0),
        flat[:1].expand(1),
    ]
    rest = [
        torch.randn(3).to_sparse(),
        torch.randn(3, device="meta"),
        torch.randn(1).expand(3),
        torch.randn(4, 6)[1:, ::2],
        torch.randn(3, dtype=torch.complex64).conj().imag,
        flat.as_strided((3, 3), (1, 1)),
        torch.ones(3, dtype=torch.int32),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1, count=3),
        torch._efficientzerotensor((3,)),
        torch.randn(3).as_subclass(Subclass),
    ]
    batch = _kernel.tensors(taken)
    assert [id(t) for t in batch.all] == [id(t) for t in taken]
    norms = batch.norms(2.0)
    assert [n == ABSENT for n in norms] == [t.numel() == 0 for t in taken]
    assert batch.norm(2.0) == pytest.approx(math.hypot(*(n for n in norms if n != ABSENT)))
    for tensor in rest:
        assert _kernel.tensors([*taken, tensor]) is None
    subclass = torch.ones(2).as_subclass(Subclass)
    subclass.grad = torch.ones(2)
    assert _kernel.gradients([subclass]) is None


@pytest.mark.parametrize("count", [1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 5000])
def test_gradients_in_order_once_and_only_where_there_are_some(count: int) -> None:
    # Around powers of 2, where the table of repeated gradients is fullest and the stack's room ends.
    grads = list(torch.randn(count, 1))
    parameters = with_gradients([each for grad in grads for each in (grad, None)])
    parameters += with_gradients([grads[0]])  # one gradient for two parameters
    for repeated in (parameters, parameters * 3, tuple(parameters * 3)):
        assert [id(g) for g in _kernel.gradients(repeated).all] == list(map(id, grads))


def test_facts() -> None:
    def facts(*tensors: torch.Tensor) -> int:
        return int(_kernel.tensors(tensors).facts)

    single, twice = torch.ones(3), torch.ones(3, dtype=torch.float64)
    assert facts(single, single.half()) == Facts.SMALL
    assert facts(single, twice) == Facts.SMALL | Facts.DOUBLE
    assert facts(torch.ones(2, dtype=torch.complex64)) == Facts.SMALL | Facts.COMPLEX
    assert facts(torch.ones(2, dtype=torch.complex128)) == Facts.SMALL | Facts.COMPLEX | Facts.DOUBLE
    assert facts(torch.ones(4, 3).t(), torch.ones(0, 3)[:, ::2]) == Facts.SMALL
    assert facts(torch.ones(1 << 19)) == Facts.SMALL
    assert facts(torch.ones(1 << 19), single) == 0
    parameters = with_gradients([single, single])
    assert _kernel.gradients(parameters).facts == Facts.SMALL | Facts.SHARED_GRADIENT
    assert _kernel.gradients(parameters[:1]).facts == Facts.SMALL


def test_wrong_arguments() -> None:
    batch = _kernel.tensors([torch.ones(2), torch.ones(2, dtype=torch.complex64)])
    with pytest.raises(TypeError):
        batch.scale_("a")
    with pytest.raises(ValueError, match="one number for each of 2 tensors"):
        batch.scale_each_([0.5])
    with pytest.raises(TypeError):
        batch.scale_each_([0.5, None])
    with pytest.raises(ValueError, match="complex"):
        batch.clamp_(0.5)
    with pytest.raises(ValueError, match="at least 0"):
        _kernel.tensors([torch.ones(2)]).clamp_(math.nan)
    with pytest.raises(TypeError, match="cannot create"):
        _kernel.Batch()
    assert [t._version for t in batch.all] == [0, 0]


def test_versions_of_what_is_written_and_of_nothing_else() -> None:
    tensors = [torch.ones(2), torch.ones(2)]
    batch = _kernel.tensors(tensors)
    batch.norm(2.0)
    batch.scale_(1.0)
    batch.scale_each_([1.0, 0.5])
    assert [t._version for t in tensors] == [0, 1]
    for _ in range(2):  # nothing is beyond the second time
        batch.clamp_(0.75)
        batch.zero_nonfinite_()
        assert [t.tolist() for t in tensors] == [[0.75, 0.75], [0.5, 0.5]]
        assert [t._version for t in tensors] == [1, 1]
    tensors[1][1] = math.nan
    batch.zero_nonfinite_()
    assert tensors[1].tolist() == [0.5, 0]
    assert [t._version for t in tensors] == [1, 3]


def norm_of(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(1, dtype=dtype))
    parameter.grad = torch.full((1,), value, dtype=dtype)
    return torchclip.clip_grad_norm_(parameter, math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [2.5, 1e-45, 1e30])
def test_a_norm_is_a_tensor_like_any_other(value: float, dtype: torch.dtype) -> None:
    tensor, wanted = norm_of(value, dtype), torch.tensor(value, dtype=dtype)
    assert type(tensor) is torch.Tensor
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (wanted.shape, wanted.dtype, "cpu")
    assert (tensor._version, tensor.requires_grad, tensor.is_inference()) == (0, False, False)
    for same in (tensor, copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.numpy()):
        np.testing.assert_array_equal(same, wanted)
    tensor.fill_(3.0).requires_grad_()
    (tensor * 2).backward()
    assert tensor.grad is not None
    assert (tensor.item(), tensor._version, tensor.grad.item()) == (3.0, 1, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_tensors_of_their_own(dtype: torch.dtype) -> None:
    norms = [norm_of(float(value), dtype) for value in range(1, 200)]
    views = [norm.view(1) for norm in norms]
    for norm in norms[::2]:
        norm.zero_()
    later = [norm_of(1.0, dtype) for _ in range(200)]
    assert [float(view) for view in views] == [0.0 if i % 2 == 0 else i + 1.0 for i in range(199)]
    assert len({norm.data_ptr() for norm in [*norms, *later]}) == 399


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_can_be_used_after_one_that_was_taken_in_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        inside = [norm_of(2.0, dtype) for _ in range(100)]
    assert [float(norm) for norm in inside] == [2.0] * 100
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    for _ in range(100):  # an inference tensor could not be saved for the backward pass
        (weight * norm_of(3.0, dtype)).backward()
    assert weight.grad == 300.0


def test_overlapping_tensors_are_written_one_after_the_other() -> None:
    memory = torch.ones(300_000)
    first, second = memory[:200_000], memory[100_000:]
    torch.set_num_threads(4)
    _kernel.tensors([second, first]).scale_(0.5)
    wanted = torch.full((300_000,), 0.5)
    wanted[100_000:200_000] = 0.25
    assert torch.equal(memory, wanted)
    for _ in range(10):  # in the same memory in reverse, so that two threads would meet
        _kernel.tensors([memory, memory.view(300, 1000)]).scale_(0.5)
    assert torch.equal(memory, wanted * 0.25**10)


def test_two_python_threads() -> None:
    torch.manual_seed(0)
    models = [[torch.randn(s) for s in ((1000, 500), (30,), (1000, 100))] for _ in range(2)]
    wanted = [_kernel.tensors(m).norm(2.0) for m in models]
    torch.set_num_threads(2)
    wrong: list[float] = []

    def work(i: int) -> None:
        for _ in range(100):
            batch = _kernel.tensors(models[i])
            got = batch.norm(2.0)
            batch.scale_each_([-1.0] * 3)  # the norm stays
            if got != wanted[i]:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_does_not_hang() -> None:
    script = """
import os, torch
from torchclip import _kernel, kernel
t = torch.ones(1_000_000)
torch.set_num_threads(2)
assert _kernel.tensors([t]).norm(2.0) == 1000.0
pid = os.fork()
if pid == 0:
    batch = _kernel.tensors([t])
    batch.scale_(2.0)
    os._exit(0 if batch.norm(2.0) == 2000.0 else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(command, check=True, timeout=120, cwd=os.path.dirname(os.path.dirname(kernel.__file__)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_torch_and_the_kernel_share_one_openmp() -> None:
    # In a process of its own, as other packages bring copies along.
    script = "import torchclip; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    libraries = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    assert len(libraries) == _kernel.has_threads()


def test_it_is_off_in_all_threads_until_the_last_block_has_ended() -> None:
    before, seen = kernel.status(), list[str]()
    first, second = kernel.disabled(), kernel.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    thread = threading.Thread(target=lambda: seen.append(kernel.status()))
    thread.start()
    thread.join()
    second.__exit__(None, None, None)
    assert seen == ["off (torchclip.kernel.disabled())"]
    assert kernel.status() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_coefficient_leaves_the_same_bits_without_it(dtype: torch.dtype) -> None:
    mine, others = (with_gradients([randn(40, 33, dtype=dtype), randn(7, dtype=dtype)]) for _ in range(2))
    torchclip.clip_grads_with_norm_(mine, 1.0, 3.7)
    with kernel.disabled():
        torchclip.clip_grads_with_norm_(others, 1.0, 3.7)
    assert [bits(p.grad) for p in mine] == [bits(p.grad) for p in others]


def fingerprint(*grads: torch.Tensor) -> bytes:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    found: bytes | None = _kernel.fingerprint(parameters)
    assert found is not None
    assert found == _kernel.fingerprint(parameters)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "values", [[3.0], [0.0, 2.0], [math.inf, 0.5], [math.nan, 0.0, -1e-3], [0.0] * 40_000 + [1.0]]
)
def test_a_fingerprint_is_another_one_after_every_change(dtype: torch.dtype, values: list[float]) -> None:
    fixed = torch.ones(2)
    changed = torch.tensor(values, dtype=dtype)
    permuted = torch.stack([torch.zeros(len(values), dtype=dtype), changed], dim=1).t()
    for tensor in (changed, permuted):
        before = fingerprint(fixed, tensor)
        assert before == fingerprint(fixed, tensor)
        assert before != fingerprint(tensor, fixed)
        assert before != fingerprint(fixed)
        tensor.data.mul_(0.5)  # no new version
        without_version = fingerprint(fixed, tensor)
        assert without_version != before
        tensor.mul_(1.0)
        assert fingerprint(fixed, tensor) != without_version
        tensor.data = tensor.clone()
        assert fingerprint(fixed, tensor) not in (before, without_version)


def test_a_fingerprint_of_tensors_without_versions_or_numbers() -> None:
    with torch.inference_mode():
        inference = torch.ones(2)
    grads = [inference, torch.empty(0), torch.zeros(3), torch.full((3,), math.inf)]
    before = fingerprint(*grads)
    assert len(before) == 4 * 8
    grads[-1].data.neg_()  # there the first element is looked at
    assert fingerprint(*grads) != before
