"""The numerical contract, item by item, and what torch gets wrong and torchclip does not.

Item 1: the norm.  2: what is returned.  3: the coefficient.  4: non-finite gradients.  5: the same answer
every time.  6: arguments (most of it in test_arguments.py).  7: autograd.  8: layouts (more in test_clip.py).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from functions import CHANGING, CLIPPERS, FUNCTIONS
from helpers import (
    DTYPES,
    INF,
    as_numpy,
    bits,
    exact_norm,
    grad_of,
    instruction_sets,
    randn,
    with_gradients,
)
from torch import Tensor, nn

import torchclip
from torchclip import clip_grad_norm_, get_total_norm, reference
from torchclip._core import native

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]
names = pytest.mark.parametrize("name", CLIPPERS)
changing = pytest.mark.parametrize("name", CHANGING)


def relative_error(actual: Tensor, expected: float) -> float:
    return abs(float(actual) - expected) / expected


class TestWhatTorchGetsWrong:
    """Each is a silent error, or a refusal, of torch.nn.utils; docs/contract.md shows all of them."""

    @changing
    def test_a_parameter_or_a_gradient_listed_twice(self, name: str) -> None:
        # Torch counts it twice and scales it twice.
        once = with_gradients([torch.full((3,), 2.0), torch.full((2,), 2.0)])
        twice = with_gradients([torch.full((3,), 2.0), torch.full((2,), 2.0)])
        sharing = with_gradients([twice[0].grad])
        listed = [*twice, twice[0], *sharing]
        results = [CLIPPERS[name].ours(once, 0.5, 2), CLIPPERS[name].ours(listed, 0.5, 2)]
        assert results[0] is None or results[0].equal(results[1])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(once, twice, strict=True))

    @pytest.mark.parametrize(
        ("dtype", "just_beyond"),
        [(torch.float16, 65_510.0), (torch.bfloat16, 3.3961e38), (torch.float32, 3.40282354e38)],
    )
    def test_clip_value_beyond_the_range_of_the_dtype(self, dtype: torch.dtype, just_beyond: float) -> None:
        # Torch raises.
        gradient = torch.tensor([INF, 1.0, -INF, math.nan] * 10, dtype=dtype)
        before = gradient.clone()
        for clip_value in (just_beyond, 1e39, 1e300):
            torchclip.clip_grad_value_(with_gradients([gradient]), clip_value)
        torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)

    def test_an_infinite_max_norm_only_measures(self) -> None:
        # Torch makes every gradient NaN.
        parameters = with_gradients([torch.tensor([INF]), torch.tensor([2.0])])
        assert clip_grad_norm_(parameters, INF) == INF
        assert [float(p.grad) for p in parameters] == [INF, 2.0]


class TestItem1TheNorm:
    SIZES = (1, 2, 31, 127, 128, 1023, 1025, 16_384, 16_385, 65_536, 65_537, 1_048_577, 3_000_001)

    @pytest.mark.parametrize("size", SIZES)
    def test_of_constant_and_of_random_gradients_of_every_size(self, size: int) -> None:
        for gradient in (torch.full((size,), 1.893), randn(size), torch.arange(1.0, size + 1.0)):
            # Squares of float32 are exact in float64.
            wide = gradient.double().numpy()
            squares = math.fsum(np.square(wide).tolist()) if size < 10**6 else float(np.square(wide).sum())
            assert relative_error(get_total_norm(gradient), math.sqrt(squares)) < 1e-7
            assert relative_error(get_total_norm(gradient, 1), float(np.abs(wide).sum())) < 1e-7
            assert get_total_norm(gradient, INF) == float(np.abs(wide).max())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("exponents", [(-2, 2), (-12, 12), (-37, 37), (-44, -38), (30, 38)])
    def test_of_mixed_magnitudes(self, exponents: tuple[int, int], dtype: torch.dtype) -> None:
        wider = 8 if dtype == torch.float64 else 1
        rng = np.random.default_rng(0)
        values = rng.standard_normal(500) * 10.0 ** rng.uniform(
            wider * exponents[0], wider * exponents[1], 500
        )
        gradient = torch.tensor(values, dtype=dtype)
        gradient = torch.where(gradient.isfinite(), gradient, 1.0)
        expected = exact_norm(gradient.tolist())
        total_norm = float(get_total_norm(gradient))
        if expected > torch.finfo(dtype).max:
            assert total_norm == INF
        else:
            assert total_norm == pytest.approx(expected, rel=1e-7, abs=1e-45 if dtype == torch.float32 else 0)

    @pytest.mark.parametrize("number", [1e200, 1e-150, 1e-160, 1e-200, 1e307, 5e-324])
    @pytest.mark.parametrize("order", [0.5, 1, 2, 3, INF])
    def test_neither_overflows_nor_underflows_in_float64(self, number: float, order: float) -> None:
        split = [torch.full((4,), number, dtype=torch.float64) for _ in range(2)]
        split.append(torch.zeros(70_000, dtype=torch.float64))
        torch.set_num_threads(2)  # which share the work on so many elements
        expected = number * (8 ** (1 / order))
        assert float(get_total_norm(split, order)) == pytest.approx(expected, rel=1e-12, abs=5e-324)
        split[1].fill_(1.0)  # each tensor has a range of its own
        norms = torchclip.clip_grad_norm_per_parameter_(with_gradients(split), INF, order).tolist()
        half = 4 ** (1 / order)
        assert norms == pytest.approx([number * half, half, 0.0], rel=1e-12, abs=5e-324)

    @pytest.mark.parametrize("order", [-2, -1, 0.5, 1, 3, 20, 100])
    @pytest.mark.parametrize("number", [1e-40, 1e-25, 1.0, 1e20, 3e38])
    def test_neither_overflows_nor_underflows_for_any_order(self, number: float, order: float) -> None:
        number = float(torch.tensor(number))
        expected = number * 4 ** (1 / order)
        actual = float(get_total_norm([torch.full((3,), number), torch.full((1,), -number)], order))
        assert actual == pytest.approx(expected if expected < 3.4e38 else INF, rel=1e-6, abs=1e-45)

    def test_an_order_near_0_overflows_to_inf(self) -> None:
        ones = [torch.ones(1, dtype=d) for d in (torch.float32, torch.float64, torch.float16)]
        assert get_total_norm(ones, 1e-3) == INF

    @pytest.mark.usefixtures("on_host")
    @pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, INF])
    def test_of_complex_numbers_of_few_digits(self, order: float) -> None:
        least = 5e-324
        values = torch.complex(*torch.tensor([[3 * least] * 50, [2 * least] * 50], dtype=torch.float64))
        exact = math.sqrt(13) * (1.0 if math.isinf(order) else 50 ** (1 / order))
        twin = reference.global_norm([as_numpy(values)], order)
        for norm in (float(get_total_norm([values], order)), twin):
            assert abs(norm / least - exact) <= 0.5 + 1e-12 * exact


class TestItem2WhatIsReturned:
    def test_dtype(self) -> None:
        one = {d: torch.ones(2, dtype=d) for d in DTYPES}
        for a, b in itertools.product(DTYPES, DTYPES):
            wide = {a, b} & {torch.float64, torch.complex128}
            total_norm = get_total_norm([one[a], one[b]])
            assert total_norm.dtype == (torch.float64 if wide else torch.float32)
            assert total_norm.shape == ()
            assert not total_norm.requires_grad
            norms = torchclip.clip_grad_norm_per_parameter_(with_gradients([one[a], one[b].clone()]), 9.0)
            assert norms.dtype == total_norm.dtype
            assert norms.shape == (2,)

    def test_the_largest_float32_and_above(self) -> None:
        top = torch.finfo(torch.float32).max
        assert float(get_total_norm(torch.tensor([top]))) == top
        # Above it the clipping is still right, as the coefficient is float64.
        (p,) = with_gradients([torch.tensor([top, -top])])
        assert clip_grad_norm_(p, 1.0, error_if_nonfinite=True) == INF
        torch.testing.assert_close(p.grad, torch.tensor([0.5**0.5, -(0.5**0.5)]))


class TestItem3TheCoefficient:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 4.999])
    def test_every_gradient_is_multiplied_by_it_and_rounded_once(
        self, dtype: torch.dtype, max_norm: float
    ) -> None:
        gradient = torch.tensor([3.0, 4.0], dtype=dtype)
        (p,) = with_gradients([gradient.clone()])
        clip_grad_norm_(p, max_norm)
        rate = max_norm / (5 + 1e-6)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = (gradient.to(wide) * rate).to(dtype)
        eps = torch.finfo(dtype).eps if dtype in (torch.float32, torch.complex64) else 0
        torch.testing.assert_close(p.grad, expected, rtol=eps, atol=0)

    @pytest.mark.usefixtures("on_host")
    @pytest.mark.parametrize("name", [n for n in CHANGING if n != "clip_grad_value_"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients_are_not_touched_where_no_clipping_is_needed(
        self, name: str, dtype: torch.dtype
    ) -> None:
        values = torch.tensor([3.0, -0.0, 1e-7]).to(dtype)
        parameters = with_gradients(
            [values.clone(), values.clone()], [values.clone() * 100 for _ in range(2)]
        )
        CLIPPERS[name].ours(parameters, 4.3, 2)
        for p in parameters:
            assert bits(p.grad) == bits(values)
            assert p.grad._version == 0

    def test_a_norm_just_below_the_threshold_still_counts_the_1e_6(self) -> None:
        (p,) = with_gradients([torch.tensor([1.0], dtype=torch.float64)])
        clip_grad_norm_(p, 1.0)
        assert float(p.grad) == 1.0 / (1.0 + 1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
    def test_after_clipping_the_norm_is_at_most_max_norm(self, dtype: torch.dtype, scale: float) -> None:
        gradients = [randn(30, 5, dtype=dtype, scale=scale), randn(7, dtype=dtype, scale=scale)]
        before = float(get_total_norm(gradients))
        for ratio in (1e-3, 0.3, 0.999, 1.1):
            parameters = with_gradients([gradient.clone() for gradient in gradients])
            clip_grad_norm_(parameters, ratio * before)
            after = float(get_total_norm([p.grad for p in parameters]))
            # Each number is rounded to its own dtype: half a unit of bfloat16, or of its smallest number.
            assert after <= min(before, ratio * before) * (1 + 2**-8) + 1e-5

    @changing
    def test_zero_gradients_stay_zero(self, name: str) -> None:
        (p,) = with_gradients([torch.zeros(3)])
        CLIPPERS[name].ours([p], 0.0, 2)
        assert p.grad.tolist() == [0, 0, 0]


class TestItem4NonFinite:
    @pytest.mark.parametrize("bad", [INF, -INF, math.nan])
    @pytest.mark.parametrize("order", [1, 2, 3, INF])
    def test_spreads_as_torchs(self, bad: float, order: float) -> None:
        for where in (0, 1):
            gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
            gradients[where][1] = bad
            mine, theirs = (with_gradients([g.clone() for g in gradients]) for _ in range(2))
            norms = clip_grad_norm_(mine, 1.0, order), nn.utils.clip_grad_norm_(theirs, 1.0, order)
            torch.testing.assert_close(*norms, equal_nan=True, rtol=0, atol=0)
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a.grad, b.grad, equal_nan=True, rtol=0, atol=0)

    @pytest.mark.parametrize("order", [1, 2, 3, INF])
    def test_nan_wins_over_inf_wherever_they_lie(self, order: float) -> None:
        for size in (2, 70_000):
            for i, j in itertools.permutations((0, size // 2, size - 1), 2):
                gradient = torch.ones(size)
                if i != j:
                    gradient[i], gradient[j] = INF, math.nan
                    assert get_total_norm(gradient, order).isnan()
            gradient = torch.ones(size, dtype=torch.float64)
            gradient[-1] = -INF
            assert get_total_norm(gradient, order) == INF

    def test_nan_stays_and_inf_is_limited_by_value(self) -> None:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            (p,) = with_gradients([torch.tensor([INF, -INF, math.nan, 0.5], dtype=dtype)])
            torchclip.clip_grad_value_(p, 1.0)
            torch.testing.assert_close(
                p.grad, torch.tensor([1, -1, math.nan, 0.5], dtype=dtype), equal_nan=True, rtol=0, atol=0
            )

    def test_per_parameter_and_per_example_spread_only_within_their_own(self) -> None:
        parameters = with_gradients([torch.tensor([math.nan, 1.0]), torch.tensor([3.0, 4.0])])
        norms = torchclip.clip_grad_norm_per_parameter_(parameters, 1.0)
        assert norms[0].isnan()
        assert norms[1] == 5
        assert parameters[0].grad.isnan().all()
        torch.testing.assert_close(parameters[1].grad, torch.tensor([0.6, 0.8]))

        weight = nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.tensor([[math.nan, 1.0], [0.0, 0.001]])
        torchclip.clip_grad_adaptive_(weight)
        assert weight.grad[0].isnan().all()
        assert weight.grad[1].isfinite().all()

    @pytest.mark.parametrize("kind", ["dense", "float16", "complex", "sparse", "csr"])
    def test_the_error_comes_before_any_change_and_names_the_gradients(self, kind: str) -> None:
        bad = torch.tensor([[1.0, INF], [math.nan, -INF]])
        convert: dict[str, Callable[[Tensor], Tensor]] = {
            "dense": torch.Tensor.clone,
            "float16": torch.Tensor.half,
            "complex": lambda t: t.to(torch.complex64),
            "sparse": torch.Tensor.to_sparse,
            "csr": torch.Tensor.to_sparse_csr,
        }
        bad = convert[kind](bad)
        parameters = with_gradients([torch.full((3,), 5.0), None, torch.full((4,), INF)])
        parameters[1] = nn.Parameter(torch.zeros_like(bad) if kind != "csr" else bad.clone())
        parameters[1].grad = bad
        message = (
            r"total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be.*"
            r"gradient 1 of shape \(2, 2\) \(2 inf, 1 nan\), gradient 2 of shape \(4,\) \(4 inf, 0 nan\)\."
        )
        with pytest.raises(RuntimeError, match=message):
            clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        assert parameters[0].grad.tolist() == [5, 5, 5]
        assert [p.grad._version for p in parameters] == [0, 0, 0]
        message = "gradients from `tensors` is non-finite.* and get the non-finite norm, set `error_if"
        with pytest.raises(RuntimeError, match=message):
            get_total_norm([p.grad for p in parameters], error_if_nonfinite=True)

    def test_many_gradients_are_shortened(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"gradient 9 of shape \(1,\) \(1 inf, 0 nan\) and 40 more\."
        ) as error:
            get_total_norm([torch.tensor([INF]) for _ in range(50)], error_if_nonfinite=True)
        assert len(str(error.value)) < 1000


def threads_and_instructions() -> Iterator[None]:
    """Has torch use some numbers of threads, and the kernel, where it is on, each set of instructions."""
    try:
        for count, instructions in itertools.product((1, 2, 4), instruction_sets() or [""]):
            torch.set_num_threads(count)
            if instructions:
                native.extension.select(instructions)
            yield
    finally:
        if native.active():
            native.extension.select(None)


class TestItem5TheSameAnswerEveryTime:
    @pytest.mark.usefixtures("on_host")
    @names
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_neither_threads_nor_instructions_matter(self, name: str, dtype: torch.dtype) -> None:
        gradients = [randn(200_000, dtype=dtype), randn(900, 100, dtype=dtype), randn(7, dtype=dtype)]
        gradients += [randn(300, 400, dtype=dtype).t(), *(randn(200, 300, dtype=dtype) for _ in range(5))]
        for order in (1, 2, 3) if name != "clip_grad_value_" else (2,):
            seen = set()
            for _ in threads_and_instructions():
                parameters = with_gradients([g.clone() for g in gradients])
                result = CLIPPERS[name].ours(parameters, 0.3, order)
                seen.add((None if result is None else bits(result), *(bits(p.grad) for p in parameters)))
            assert len(seen) == 1

    def test_neither_threads_nor_instructions_matter_per_example(self) -> None:
        gradients = [randn(1000, 300), randn(1000)]
        seen = set()
        for _ in threads_and_instructions():
            seen.add(tuple(bits(total) for total in torchclip.clip_per_example(gradients, 0.5)[0]))
        assert len(seen) == 1


class TestItem7Autograd:
    @changing
    def test_a_graph_that_saved_the_gradient_notices(self, name: str) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            if name == "clip_grad_value_" and dtype.is_complex:
                continue
            parameters = with_gradients([torch.full(shape, 5, dtype=dtype) for shape in ((3,), (2, 2))])
            products = [torch.ones_like(p.grad).requires_grad_() * p.grad for p in parameters]
            CLIPPERS[name].ours(parameters, 0.1, 2)
            for p, product in zip(parameters, products, strict=True):
                assert p._version == 0
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    product.abs().sum().backward()

    @changing
    @pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
    def test_gradients_that_require_grad(self, name: str) -> None:
        def parameters() -> nn.Parameter:
            p = nn.Parameter(torch.tensor([3.0, 4.0]))
            (p**3).sum().backward(create_graph=True)
            return p

        mine, plain = parameters(), nn.Parameter(torch.tensor([3.0, 4.0]))
        plain.grad = grad_of(mine).detach().clone()
        results = CLIPPERS[name].ours([mine], 0.5, 2), CLIPPERS[name].ours([plain], 0.5, 2)
        assert results[0] is None or (results[0].equal(results[1]) and not results[0].requires_grad)
        assert grad_of(mine).requires_grad
        assert grad_of(plain).grad_fn is None
        assert torch.equal(grad_of(mine).detach(), grad_of(plain))
        mine.grad = None

    def test_a_total_norm_that_requires_grad(self) -> None:
        (p,) = with_gradients([torch.tensor([3.0, 4.0])])
        torchclip.clip_grads_with_norm_(p, 1.0, torch.tensor(5.0, requires_grad=True) * 1)
        torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))


COMPILED: dict[str, Callable[[Any], Any]] = {
    **{name: function.of for name, function in FUNCTIONS.items()},
    "clip_grad_norm_, inf": lambda ps: clip_grad_norm_(ps, 1, "inf"),
}


@pytest.mark.parametrize("everywhere", ["torch operations"], indirect=True)  # as in compiled code
# Both find every break; the second also needs operations without side effects.
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_item_7_compiles_without_a_break(name: str, backend: str) -> None:
    torch.compiler.reset()
    call = COMPILED[name]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float32)
    gradients = [randn(4, i + 1, dtype=dtype) for i, dtype in enumerate(dtypes)]
    if backend == "eager" and name != "clip_grad_value_":
        gradients.append(randn(4, 2, dtype=torch.complex64))
    mine, others = (with_gradients([each.clone() for each in gradients]) for _ in range(2))
    result, expected = compiled(mine), call(others)
    if expected is not None:
        torch.testing.assert_close(result, expected, check_dtype=True)
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_item_6_a_negative_norm_that_cannot_be_looked_at_gives_nan() -> None:
    torch.compiler.reset()
    compiled = torch.compile(torchclip.clip_grads_with_norm_, fullgraph=True, backend="eager")
    parameters = with_gradients([torch.ones(2)])
    compiled(parameters, 1.0, torch.tensor(-3.0))
    assert parameters[0].grad.isnan().all()
    with pytest.raises(TypeError, match=r"`total_norm` must be a number, got a tensor of shape \(2,\)"):
        torch.vmap(lambda _: torchclip.clip_grads_with_norm_(parameters, 1.0, torch.ones(2)))(torch.ones(1))


class TestItem8Layouts:
    """test_clip.py tests each layout and function by itself."""

    def test_all_together_are_one_vector(self) -> None:
        with torch.no_grad():
            gradients = [
                torch.full((2, 3), 2.0).t(),
                torch.full((), 2.0),
                torch.zeros(0),
                torch.full((10,), 2.0)[::2],
                torch.full((4,), 2.0, dtype=torch.float64),
                torch.full((4,), 2.0, dtype=torch.bfloat16),
                torch.full((2,), 2.0j, dtype=torch.complex64).conj(),
                torch.full((3, 1), 2.0).to_sparse(),
                torch.full((2, 3), 2.0).to_sparse_csr(),
                torch.full((1,), 2.0).expand(5),
                torch.full((5,), 2.0).unfold(0, 3, 1),
            ]
        count = 6 + 1 + 5 + 4 + 4 + 2 + 3 + 6 + 5 + 9
        assert float(get_total_norm(gradients)) == pytest.approx(2 * count**0.5, rel=1e-12)
        assert float(get_total_norm(gradients, 1)) == 2 * count
        assert float(get_total_norm(gradients, 0)) == count
