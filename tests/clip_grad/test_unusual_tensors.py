"""Unusual tensors and callers: refused before anything changes, or treated as torch does."""

import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functions import CHANGING, FUNCTIONS, Function
from helpers import grad_of, randn, with_gradients
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchclip
from torchclip._core import memory

pytestmark = [pytest.mark.usefixtures("kernel_on_and_off"), pytest.mark.filterwarnings("ignore:Sparse ")]

every = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
changing = pytest.mark.parametrize("function", CHANGING.values(), ids=CHANGING)


def without_memory(*shape: int, offset: int = 0) -> Tensor:
    tensor = torch.ones(offset + math.prod(shape))[offset:].view(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def sparse_without_memory() -> Tensor:
    tensor = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.ones(2), (3,), check_invariants=True
    ).coalesce()
    tensor._values().untyped_storage().resize_(0)
    return tensor


# Tensors without memory


@pytest.mark.parametrize("length", [3, 300, 70_000])
def test_a_tensor_of_zeros_without_memory_is_measured_as_zeros(length: int) -> None:
    zeros = torch._efficientzerotensor((length,))
    assert torchclip.get_total_norm([zeros]) == 0
    assert torchclip.get_total_norm([zeros, torch.tensor([3.0, 4.0])]) == 5


def test_measured_tensors_without_memory_are_refused() -> None:
    for gone in (without_memory(3), without_memory(70_000, offset=5), sparse_without_memory()):
        with pytest.raises(RuntimeError, match=r"item 1 of `tensors`, .* no memory"):
            torchclip.get_total_norm([torch.ones(2), gone])
    with pytest.raises(RuntimeError, match=r"item 0 of `grads`, .* no memory"):
        torchclip.clip_per_example([without_memory(2, 3)], 1.0)


def test_weights_without_memory_are_refused() -> None:
    (weight,) = with_gradients([torch.ones(3, 3)])
    weight.data = without_memory(3, 3)
    with pytest.raises(RuntimeError, match=r"item 0 of `parameters`, .* no memory"):
        torchclip.clip_grad_adaptive_([weight])
    assert weight.grad.eq(1).all()


# Gradients that cannot be changed, or only in some circumstances


def expanded_sparse() -> Tensor:
    places, values = torch.tensor([[0, 1]]), torch.ones(1).expand(2)
    return torch.sparse_coo_tensor(places, values, (4,), check_invariants=True, is_coalesced=True)


OVERLAPS = r"more than one element .*item 2 of `parameters` has .*, which is expanded or overlaps itself"
OVERLAPPING: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.ones(1).expand(4),
    "windows": lambda: torch.ones(6).unfold(0, 3, 1),
    "a stride of half a row": lambda: torch.ones(9).as_strided((4, 2), (2, 2)),
    "axes that meet": lambda: torch.ones(20).as_strided((3, 4), (3, 2)),
    "three axes": lambda: torch.ones(20).as_strided((2, 2, 3), (1, 5, 1)),
    "complex": lambda: torch.ones(6, dtype=torch.complex64).as_strided((3, 2), (1, 1)),
}
NOT_SCALED = r"^item 2 of `parameters` has a gradient of shape \(2,\) and dtype torch.\w+, which cannot be sc"
NO_MEMORY = r"item 2 of `parameters` has a gradient .* no memory"
REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    **{kind: (make, OVERLAPS) for kind, make in OVERLAPPING.items()},
    "expanded sparse": (expanded_sparse, f"{OVERLAPS}|sparse within its rows"),
    "int64": (lambda: torch.ones(2, dtype=torch.int64), NOT_SCALED),
    "float8": (lambda: torch.ones(2).to(torch.float8_e5m2), NOT_SCALED),
    "zeros": (lambda: torch._efficientzerotensor((3,)), NO_MEMORY),
    "resized": (lambda: without_memory(3), NO_MEMORY),
    "view of resized": (lambda: without_memory(3, offset=10), NO_MEMORY),
    "sparse without memory": (sparse_without_memory, NO_MEMORY),
}


@changing
@pytest.mark.parametrize("kind", REFUSED)
def test_a_gradient_that_cannot_be_changed_is_refused_before_any_is(function: Function, kind: str) -> None:
    make, message = REFUSED[kind]
    gradient = make()
    other = torch.zeros(gradient.shape, dtype=gradient.dtype)
    other.grad = gradient
    before, after = with_gradients([torch.full((3,), 5.0) for _ in range(2)])
    with pytest.raises((RuntimeError, TypeError), match=message):
        function([nn.Parameter(torch.zeros(1)), before, other, after])
    assert [grad._version for grad in (before.grad, gradient, after.grad)] == [0, 0, 0]
    assert all(p.grad.eq(5).all() for p in (before, after))


@changing
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.full((2, 3), 4.0),
        lambda: torch.full((2, 3), 4.0).to_sparse(1),
        lambda: torch.full((2, 3), 4.0 + 3j, dtype=torch.complex32),
        lambda: torch.full((3, 2), 4.0).t(),
        lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0, 1]]), torch.full((3, 3), 4.0), (2, 3)),
    ],
    ids=["dense", "sparse", "complex32", "transposed", "several entries for one place"],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_gradients_made_in_inference_mode_are_clipped_as_others_are(
    function: Function, make: Callable[[], Tensor]
) -> None:
    def parameters(inference: bool) -> list[Any]:
        with torch.inference_mode(inference):
            gradient = make()
        weight = nn.Parameter(torch.ones(2, 3, dtype=gradient.dtype))
        weight.grad = gradient
        return [*with_gradients([torch.full((2, 3), 4.0)]), weight]

    ours, usual = parameters(True), parameters(False)
    try:
        function(usual)
    except TypeError as refused:
        with pytest.raises(TypeError, match=str(refused)[:20]):
            function(ours)
        assert ours[0].grad.eq(4).all()
        return
    function(ours)
    for a, b in zip(ours, usual, strict=True):
        torch.testing.assert_close(_wide(a.grad), _wide(b.grad), rtol=0, atol=0)


def _wide(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense()
    return dense.to(torch.complex64) if dense.is_complex() else dense


def test_mkldnn_gradients_are_clipped_by_value() -> None:
    weight = torch.zeros(2, 2).to_mkldnn().requires_grad_()
    weight.grad = torch.tensor([[-3.0, 0.5], [2.0, math.nan]]).to_mkldnn()
    torchclip.clip_grad_value_([weight], 1.0)
    expected = torch.tensor([[-1.0, 0.5], [1.0, math.nan]])
    torch.testing.assert_close(weight.grad.to_dense(), expected, equal_nan=True)
    with pytest.raises(TypeError, match=r"has layout torch\._mkldnn, but adaptive clipping"):
        torchclip.clip_grad_adaptive_([weight])


# What records or transforms operations


class Seen(TorchFunctionMode):
    """Counts the operations that change something."""

    def __init__(self) -> None:
        self.changes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.changes += getattr(func, "__name__", "").rstrip("0123456789").endswith("_")
        return func(*args, **(kwargs or {}))


class SeenInDispatch(TorchDispatchMode):
    """Counts the operations below autograd that change something."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.changes += func._schema.is_mutable
        return func(*args, **(kwargs or {}))


@changing
@pytest.mark.parametrize("mode", [Seen, SeenInDispatch])
def test_a_mode_sees_every_change(function: Function, mode: type[Seen | SeenInDispatch]) -> None:
    parameters = with_gradients([randn(3, 4), randn(5)])
    with mode() as seen:
        function(parameters)
    assert seen.changes > 0


def test_a_default_device_is_nobody_who_sees_operations() -> None:
    with torch.device("cpu"):
        assert not memory.intercepted()
        with Seen():
            assert memory.intercepted()


def _called(function: Function, tensors: tuple[Tensor, ...], **arguments: Any) -> tuple[Tensor, ...]:
    """A function's result and the gradients after it, as one tuple of tensors."""
    if function.changes:
        grads = [tensor.clone() for tensor in tensors]
        result = function(with_gradients(grads, [torch.ones_like(grad) for grad in grads]), **arguments)
        return (*grads, *([] if result is None else [result]))
    if function.takes == "grads":
        return tuple(function([tensor.unsqueeze(0) for tensor in tensors], **arguments)[0])
    return (function(list(tensors), **arguments),)


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_a_jit_trace_computes_norms_anew(function: Function) -> None:
    example = (torch.ones(3, 4), torch.ones(5))
    traced = torch.jit.trace(lambda *tensors: _called(function, tensors), example, check_trace=False)
    for scale in (9.0, 0.01):
        tensors = (randn(3, 4, scale=scale), randn(5, scale=scale))
        torch.testing.assert_close(traced(*tensors), _called(function, tensors))


@every
def test_forward_mode_differentiation(function: Function) -> None:
    tensors = (randn(3, 4, dtype=torch.float64, scale=3), randn(5, dtype=torch.float64, scale=3))
    tangents = (randn(3, 4, dtype=torch.float64, seed=7), randn(5, dtype=torch.float64, seed=7))
    for order in (1, 2, 3, math.inf) if function.takes_order else (2,):
        arguments = {"norm_type": order} if function.takes_order else {}
        step = 1e-6
        up, down = (
            _called(function, tuple(t + s * d for t, d in zip(tensors, tangents, strict=True)), **arguments)
            for s in (step, -step)
        )
        with forward_ad.dual_level():
            duals = tuple(map(forward_ad.make_dual, tensors, tangents))
            found = [forward_ad.unpack_dual(each).tangent for each in _called(function, duals, **arguments)]
        for tangent, a, b in zip(found, up, down, strict=True):
            torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel_on_and_off", ["torch operations"], indirect=True)  # as in compiled code
@pytest.mark.parametrize(
    ("function", "argument", "dynamic"),
    [
        *((function, number, None) for function in CHANGING.values() for number in function.numbers),
        (CHANGING["clip_grad_norm_"], "norm_type", None),
        (CHANGING["clip_grad_norm_"], "max_norm", True),
    ],
)
def test_a_graph_holds_for_other_numbers(function: Function, argument: str, dynamic: bool | None) -> None:
    def clip(weight: Tensor, number: float) -> Any:
        return function([weight], **{argument: number})

    torch._dynamo.reset()
    compiled = torch.compile(clip, backend="eager", fullgraph=True, dynamic=dynamic)
    for number in (0.5, 0.75, 1.5):
        ours, expected = with_gradients([torch.full((3, 4), 2.0)] * 2, [torch.ones(3, 4)] * 2)
        ours.grad = ours.grad.clone()
        torch.testing.assert_close(compiled(ours, number), clip(expected, number))
        torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("clip_coef", [3.3e-39, 1.7e-42, 1.1e-45, 4.3e-60])
def test_tiny_coefficients_have_all_digits(dtype: torch.dtype, clip_coef: float) -> None:
    gradient = randn(300, dtype=dtype, scale=3e37)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = (gradient.to(wide) * clip_coef).to(dtype)
    parameters = with_gradients([gradient, gradient.clone().view(2, 150)])
    torchclip.clip_grads_with_norm_(parameters, clip_coef * 1e6, 1e6 - 1e-6)
    for parameter in parameters:
        assert torch.equal(parameter.grad.view(-1), expected)


# What callers pass


@pytest.mark.parametrize("clip", [torchclip.clip_grad_norm_, torchclip.clip_grad_norm_per_parameter_])
@pytest.mark.parametrize("place", [0, 1])
def test_a_meta_gradient_among_others_is_refused(clip: Callable[..., Tensor], place: int) -> None:
    parameters = with_gradients([torch.ones(2, 3)])
    with torch.device("meta"):
        parameters[place:place] = with_gradients([torch.ones(4, 3)])
    with pytest.raises(
        TypeError, match=rf"gradient {place} of shape \(4, 3\) is on the device 'meta'.*to_empty"
    ):
        clip(parameters, 0.5)
    assert torch.equal(grad_of(parameters[1 - place]), torch.ones(2, 3))


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"])
def test_torchs_functions_can_be_pickled_while_torchclips_are_in_their_place(name: str) -> None:
    original = getattr(nn.utils, name)
    before = pickle.dumps(original)
    with torchclip.installed():
        held = pickle.dumps(partial(original, max_norm=1.0))
        assert pickle.loads(held).func is original
        assert pickle.loads(before) is getattr(nn.utils, name)
    assert pickle.dumps(original) == before
    assert pickle.loads(held).func is original


@changing
def test_gradients_in_place_of_parameters_give_a_warning(function: Function) -> None:
    gradients = [torch.full((2,), 9.0), torch.full((3,), 9.0)]
    with pytest.warns(UserWarning, match="Pass the parameters themselves, not their gradients") as caught:
        function(gradients)
    assert [warning.filename for warning in caught] == [function.__call__.__code__.co_filename]
    assert all(gradient.eq(9).all() for gradient in gradients)


@changing
def test_a_model_that_has_no_gradients_gives_none(function: Function) -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with_gradient = torch.ones(2)
    with_gradient.grad = torch.ones(2)
    passed: list[Any] = [frozen, frozen.parameters(), nn.Linear(2, 2), nn.Identity(), []]
    passed += [(p for p in with_gradients([None])), torch.ones(2, requires_grad=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parameters in [*passed, [with_gradient, torch.ones(2)]]:
            function(parameters)
