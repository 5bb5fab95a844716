"""The functions against their NumPy twins and torch's own, and what they take: layouts, iterables, modes."""

import functools
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from functions import CHANGING, CLIPPERS, FUNCTIONS, Function
from helpers import (
    DTYPES,
    INF,
    LOW_PRECISION,
    NORM_TYPES,
    as_numpy,
    assert_same_up_to_rounding,
    randn,
    random_gradients,
    with_gradients,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import torchclip
from torchclip import reference

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "scalar": [()],
    "vector": [(3,)],
    "two": [(2, 3), (4,)],
    "many": [(5,)] * 40,
    "mixed": [(2, 3, 4), (), (7, 1), (1, 1, 1, 1)],
    "with empty ones": [(0,), (5,), (3, 0), (0, 3)],
    "large": [(66_000,), (90, 200), (3, 20_000), (3,)],
}
LIMITS = [0, 0.01, 3, INF]
names = pytest.mark.parametrize("name", CLIPPERS)
changing = pytest.mark.parametrize("name", CHANGING)


def grid(name: str) -> Iterator[tuple[str, torch.dtype, float | str, float]]:
    """Kinds of shapes, dtypes and orders that a function takes, and limits: all of them with two orders."""
    orders = NORM_TYPES if CLIPPERS[name].orders else [2]
    for kind, dtype, order in itertools.product(SHAPES, DTYPES, orders):
        if name == "clip_grad_value_" and dtype.is_complex:
            continue
        small = kind not in ("large", "many")
        for limit in LIMITS if small and order in (2, INF) else [1.0]:
            yield kind, dtype, order, limit


@functools.cache  # as drawing them takes longer than clipping
def numbers(kind: str, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Tensors of these shapes; each test takes copies."""
    return random_gradients(SHAPES[kind], dtype, scale)


def in_a_row(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def norms_close(actual: Tensor, expected: float | list[float], dtype: torch.dtype) -> None:
    rtol = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-7
    np.testing.assert_allclose(as_numpy(actual), expected, rtol=rtol)


# Twins


@names
def test_equals_its_numpy_twin(name: str) -> None:
    clipper = CLIPPERS[name]
    for kind, dtype, order, limit in grid(name):
        gradients = numbers(kind, dtype)
        # Some weights have norms below the least one of adaptive clipping.
        values = [v if i % 2 else v / 1000 for i, v in enumerate(numbers(kind, dtype, scale=0.5))]
        parameters = with_gradients([g.clone() for g in gradients], [v.clone() for v in values])
        twins = [as_numpy(g) for g in gradients]
        result = clipper.ours(parameters, limit, order)
        expected = clipper.twin([as_numpy(v) for v in values], twins, limit, order)
        if expected is not None:
            norms_close(result, expected, dtype)
        assert torch.equal(in_a_row(parameters), in_a_row(values))
        assert_same_up_to_rounding(
            in_a_row(p.grad for p in parameters), np.concatenate([twin.ravel() for twin in twins])
        )


@pytest.mark.parametrize("name", [n for n, c in CLIPPERS.items() if c.torchs])
def test_equals_torch_where_torch_is_right(name: str) -> None:
    clipper = CLIPPERS[name]
    assert clipper.torchs is not None
    for kind, dtype, order, limit in grid(name):
        # Torch counts tensors for order 0, has no inf norm of nothing, and sums in float16.
        if order == 0 or kind == "with empty ones":
            continue
        if dtype in LOW_PRECISION and (order not in (2, INF, "inf") or kind == "large"):
            continue
        mine, theirs = (with_gradients([g.clone() for g in numbers(kind, dtype)]) for _ in range(2))
        result, expected = clipper.ours(mine, limit, order), clipper.torchs(theirs, limit, order)
        rtol = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
        if expected is not None:
            np.testing.assert_allclose(float(result), float(expected), rtol=rtol)
        joint = (in_a_row(p.grad for p in parameters) for parameters in (mine, theirs))
        torch.testing.assert_close(*joint, rtol=rtol, atol=rtol)


def test_per_example_adds_up_in_float64() -> None:
    # More than one piece, and numbers of which float32 would lose most digits.
    gradient = randn(700, 3000) * torch.tensor([1e4, 1.0]).repeat(350)[:, None] + 100
    (total,), _ = torchclip.clip_per_example(gradient, 50.0)
    wide = gradient.double()
    expected = (wide * (50 / (wide.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)).sum(dim=0)
    torch.testing.assert_close(total, expected.float(), rtol=1.2e-7, atol=0)


# Which gradients


def generator(parameters: list[Any]) -> Iterator[Any]:
    yield from parameters


def dict_values(parameters: list[Any]) -> Iterable[Any]:
    return dict(enumerate(parameters)).values()


class Items:
    """A sequence for Python and for torch, although it is not registered as one."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __getitem__(self, index: int) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)


@changing
@pytest.mark.parametrize("wrap", [list, tuple, iter, generator, nn.ParameterList, set, dict_values, Items])
def test_any_iterable_of_parameters(name: str, wrap: Callable[[Any], Any]) -> None:
    one, without, other = with_gradients([torch.full((3,), 2.0), None, torch.full((2,), 2.0)])
    CLIPPERS[name](wrap([one, without, other]))
    assert without.grad is None
    assert all(bool((p.grad < 2).all()) for p in (one, other))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_single_tensor_of_several_rows_is_one_gradient(function: Function) -> None:
    alone, listed = with_gradients([torch.full((2, 3), 2.0) for _ in range(2)])
    given = (alone, [listed]) if function.changes else (alone.grad, [listed.grad])
    assert repr(function(given[0])) == repr(function(given[1]))
    assert torch.equal(alone.grad, listed.grad)


def test_no_parameters() -> None:
    assert torchclip.get_total_norm([]).equal(torch.tensor(0.0))
    assert torchclip.clip_grad_norm_([], 1.0).equal(torch.tensor(0.0))
    assert torchclip.clip_grad_norm_(with_gradients([None]), 1.0, "inf").equal(torch.tensor(0.0))
    assert torchclip.clip_grad_norm_per_parameter_([], 1.0).equal(torch.zeros(0))
    assert torchclip.clip_grad_rms_([], 1.0).equal(torch.zeros(0))
    sums, clipped = torchclip.clip_per_example([], 1.0)
    assert sums == []
    assert clipped.equal(torch.tensor(0))
    torchclip.clip_grad_value_([], 1.0)
    torchclip.clip_grads_with_norm_([], 1.0, 5.0)
    torchclip.clip_grad_adaptive_([])


@changing
def test_an_empty_generator_warns_where_it_was_passed(name: str) -> None:
    nothing: list[Tensor] = []
    with pytest.warns(
        UserWarning, match="`parameters` is an empty generator, no gradient clipping"
    ) as caught:
        getattr(torchclip, name)((p for p in nothing), **CLIPPERS[name].given)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings(record=True) as torchs:
        warnings.simplefilter("always")
        nn.utils.clip_grad_norm_((p for p in nothing), 1.0)
    assert {str(w.message) for w in torchs} <= {str(caught[0].message)}  # torch warns since 2.7


# Layouts


def permuted(gradient: Tensor) -> Tensor:
    return gradient.permute(*reversed(range(gradient.dim())))


LAYOUTS = {
    "contiguous": lambda: randn(6, 4, 5),
    "transposed": lambda: permuted(randn(6, 4, 5)),
    "channels last": lambda: randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every second": lambda: randn(12, 10)[::2, ::2],
    "every second row": lambda: randn(12, 10)[::2],
    "with gaps, large": lambda: randn(700, 400)[:, ::3],
    "view into a flat buffer": lambda: randn(100)[17:37].view(4, 5),
    "0-dim": lambda: randn(),
    "0-dim of a vector": lambda: randn(5)[2],
    "empty": lambda: torch.zeros(3, 0, 2),
    "overlapping windows": lambda: randn(10).unfold(0, 1, 1),
    "float16 with gaps": lambda: randn(8, 6, dtype=torch.float16)[:, 1::2],
    "complex with gaps": lambda: randn(8, 6, dtype=torch.complex64)[:, 1::2],
    "conjugated": lambda: randn(8, 6, dtype=torch.complex64).conj(),
    "conjugated transposed": lambda: randn(8, 6, dtype=torch.complex128).mH,
    "imaginary part of a conjugate": lambda: randn(8, dtype=torch.complex64).conj().imag,
}


@names
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_makes_no_difference(name: str, layout: str) -> None:
    gradient = LAYOUTS[layout]()
    if name == "clip_grad_value_" and gradient.is_complex():
        pytest.skip("complex numbers have no order")
    buffer = gradient if gradient._base is None or gradient.is_neg() else gradient._base
    plain = gradient.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    strided = with_gradients([None, None])
    contiguous = with_gradients([plain, torch.ones(3)])
    strided[0] = nn.Parameter(torch.zeros(plain.shape, dtype=plain.dtype))
    strided[0].grad, strided[1] = gradient, with_gradients([torch.ones(3)])[0]
    assert strided[0].grad.data_ptr() == gradient.data_ptr()
    outside = float(buffer.abs().double().sum() - gradient.abs().double().sum())

    results = [CLIPPERS[name].ours(ps, 0.5, 2) for ps in (strided, contiguous)]
    if results[0] is not None:
        torch.testing.assert_close(*results, rtol=1e-7, atol=0)
    assert_same_up_to_rounding(strided[0].grad.resolve_neg(), as_numpy(plain))
    # Elements between those of the gradient are not part of it.
    assert float(buffer.abs().double().sum() - gradient.abs().double().sum()) == pytest.approx(outside)


def test_of_several_gradients_the_first_is_refused_on_whichever_device() -> None:
    parameters = [nn.Parameter(torch.zeros(4, device=at)) for at in ("meta", "cpu")]
    for p in parameters:
        p.grad = torch.ones(1, device=p.device).expand(4)
    with pytest.raises(RuntimeError, match=r"item 0 of `parameters`"):
        torchclip.clip_grad_norm_(parameters, 0.1)


@changing
def test_axes_that_interleave_without_meeting_are_clipped(name: str) -> None:
    gradient = torch.full((12,), 5.0).as_strided((3, 2), (2, 3))
    parameters = with_gradients([gradient])
    CLIPPERS[name].ours(parameters, 0.1, 2)
    expected = with_gradients([torch.full((3, 2), 5.0)])
    CLIPPERS[name].ours(expected, 0.1, 2)
    torch.testing.assert_close(gradient, expected[0].grad)


def sparse_gradients() -> dict[str, Tensor]:
    places = torch.tensor([[0, 2, 2], [1, 0, 0]])
    uncoalesced = torch.sparse_coo_tensor(
        places, torch.tensor([3.0, 4.0, 5.0]), (3, 2), check_invariants=True
    )
    hybrid = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), randn(3, 4), (5, 4), check_invariants=True)
    dense = torch.tensor([[0.0, -3.0], [0.0, 0.0], [9.0, 0.5]])
    return {
        "coalesced": uncoalesced.coalesce(),
        "uncoalesced": uncoalesced,
        "hybrid": hybrid.coalesce(),
        "hybrid uncoalesced": hybrid,
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": randn(4, 4).to_sparse_bsr((2, 2)),
        "float64": hybrid.double(),
        "bfloat16": hybrid.bfloat16(),
        "nothing stored": torch.sparse_coo_tensor(
            torch.zeros(2, 0), torch.zeros(0), (3, 2), check_invariants=True
        ),
    }


WHOLE_ROWS = ("hybrid", "hybrid uncoalesced", "float64", "bfloat16")


def with_sparse_gradient(gradient: Tensor, value: Tensor | None = None) -> Any:
    """A parameter for a gradient; only a compressed parameter can have a compressed gradient."""
    value = torch.zeros(gradient.shape, dtype=gradient.dtype) if value is None else value
    compressed = gradient.layout != torch.sparse_coo
    parameter = nn.Parameter(gradient.clone() if compressed else value)
    parameter.grad = gradient
    return parameter


@names
def test_sparse_gradients_are_clipped_as_dense_ones(name: str) -> None:
    clipper = CLIPPERS[name]
    orders = NORM_TYPES if clipper.orders else [2]
    for (kind, sparse), order, limit in itertools.product(sparse_gradients().items(), orders, (0.5, 1e6)):
        if name == "clip_grad_adaptive_" and kind not in WHOLE_ROWS:
            continue
        # Not through zero, where added entries leave different rounding errors.
        value = torch.ones(sparse.shape, dtype=sparse.dtype)
        parameters = [with_sparse_gradient(sparse.clone(), value.clone()), *with_gradients([torch.ones(2)])]
        dense = with_gradients([sparse.to_dense(), torch.ones(2)], [value.clone(), torch.zeros(2)])
        version = parameters[0].grad._version
        results = [clipper.ours(ps, limit, order) for ps in (parameters, dense)]
        if results[0] is not None:
            torch.testing.assert_close(*results, rtol=1e-7, atol=0)
        after = parameters[0].grad
        assert after.layout == sparse.layout
        tolerance = 4 * torch.finfo(sparse.dtype).eps
        torch.testing.assert_close(after.to_dense(), dense[0].grad, rtol=tolerance, atol=tolerance * limit)
        if clipper.changes and limit < 1 and order == 2 and kind != "nothing stored":
            assert after._version > version


def test_adaptive_refuses_gradients_that_are_sparse_within_rows() -> None:
    parameters = with_gradients([torch.full((3,), 5.0)])
    parameters.append(with_sparse_gradient(sparse_gradients()["csr"]))
    with pytest.raises(TypeError, match=r"gradient 1 of shape \(3, 2\) is sparse within its rows.*to_dense"):
        torchclip.clip_grad_adaptive_(parameters)
    assert bool((parameters[0].grad == 5).all())


def test_more_small_gradients_than_are_copied_at_once() -> None:
    gradients = [randn(16_000) for _ in range(70)]
    norm = torchclip.get_total_norm(gradients)
    assert float(norm) == pytest.approx(reference.global_norm([as_numpy(g) for g in gradients]), rel=1e-7)


# Contexts


@contextmanager
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast to bfloat16": functools.partial(torch.autocast, "cpu", torch.bfloat16),
    "autocast to float16": functools.partial(torch.autocast, "cpu", torch.float16),
    "other defaults": other_defaults,
}


def tensors_in(result: Any) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else [*result[0], result[1]]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_makes_no_difference(function: Function, context: str) -> None:
    orders = [{"norm_type": order} for order in (0, 1, 2, 3, INF)] if function.takes_order else [{}]
    for dtype, order in itertools.product((*LOW_PRECISION, torch.float32, torch.float64), orders):
        grads = [*numbers("large", dtype), *numbers("with empty ones", dtype)]
        mine, others = (with_gradients([grad.clone() for grad in grads]) for _ in range(2))
        with CONTEXTS[context]():
            inside, of_none = tensors_in(function.of(mine, **order)), tensors_in(function.of([], **order))
        for a, b in zip(inside, tensors_in(function.of(others, **order)), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, others, strict=True))
        assert all(each.device.type == "cpu" and each.dtype != torch.float64 for each in of_none)


@names
@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("make", [FakeTensorMode, functools.partial(torch.device, "meta")])
def test_tensors_without_values_give_shapes(name: str, make: Callable[[], Any], is_inside: bool) -> None:
    mode = make()
    with mode:
        parameters = with_gradients([torch.ones(4, 3), torch.ones(5, dtype=torch.float16)])
    grad = parameters[0].grad
    with mode if is_inside else nullcontext():
        result = CLIPPERS[name].ours(parameters, 0.5, 2)
        sums, clipped = torchclip.clip_per_example([grad], 1.0)
    per_parameter = name in ("clip_grad_norm_per_parameter_", "clip_grad_rms_")
    found = [(sums[0], (3,)), (clipped, ())]
    found += [] if result is None else [(result, (2,) if per_parameter else ())]
    for tensor, shape in found:
        assert (type(tensor), tensor.device, tensor.shape) == (type(grad), grad.device, shape)


def test_norms_inside_functional_transforms() -> None:
    batch = randn(3, 4)
    norms = torch.func.vmap(lambda g: torchclip.get_total_norm([g]))(batch)
    torch.testing.assert_close(norms, batch.norm(dim=1))
    functional = torch.func.functionalize(lambda g: torchclip.get_total_norm([g]))(batch)
    torch.testing.assert_close(functional, batch.norm())
    scaled = torch.func.grad(lambda g: (g * torchclip.get_total_norm([g])).sum())(batch)
    torch.testing.assert_close(scaled, batch.norm().expand(3, 4))


# Resources

MEASURE = """
import resource, sys, torch, torchclip
from torchclip import kernel
def parameter(grad):
    p = torch.empty(0, dtype=grad.dtype).expand(0)
    p = torch.nn.Parameter(grad, requires_grad=False)  # its value is its gradient: half the memory
    p.grad = grad
    return p
def calls():
    ps = [parameter(torch.full((8, 1 << 20), 1.5, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    ps.append(parameter(torch.full((1 << 13, 1 << 10), 1.5).t()))
    ps.append(parameter(torch.full((1 << 13, 1 << 11), 1.5)[:, ::2]))
    yield
    for order in (1, 2, 3, float("inf")):
        torchclip.clip_grad_norm_(ps, 1.0, order)
        torchclip.clip_grad_norm_per_parameter_(ps, 1e-3, order)
    torchclip.clip_grad_value_(ps, 1e-6)
    torchclip.clip_grad_adaptive_(ps[:2], 1e-6)
def run():
    small = torch.nn.Parameter(torch.ones(300, 300)); small.grad = torch.ones(300, 300)
    for order in (1, 2, 3):
        torchclip.clip_grad_norm_(small, 1.0, order)
    torchclip.clip_grad_adaptive_(small)
    steps = calls()
    next(steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in steps: pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
if sys.argv[1] == "kernel":
    run()
else:
    with kernel.disabled():
        run()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is measured in other units elsewhere")
def test_what_is_allocated_does_not_grow_with_the_gradients(everywhere: str, on_host: None) -> None:
    command = [sys.executable, "-c", MEASURE, everywhere]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 64 * 1024, "KiB, for gradients of 144 MiB in all"


def test_a_gradient_that_parameters_share_is_scaled_once_by_the_smaller_number() -> None:
    shared = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    first, second = (
        nn.Parameter(torch.tensor(w)) for w in ([[1.0, 0.0], [9.0, 0.0]], [[2.0, 0.0], [5.0, 0.0]])
    )
    first.grad = second.grad = shared
    torchclip.clip_grad_adaptive_([first, second], clip_factor=0.1)
    torch.testing.assert_close(shared, torch.tensor([[0.06, 0.08], [0.0, 0.5]]))
