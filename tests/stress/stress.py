"""Random models and random calls of every public function, compared with the NumPy twins.

The random trainings of ``tests/clipper`` do this for the Clipper.

Run it as a program, for a number of seconds::

    python tests/stress/stress.py --seconds 600 --seed 1

Case ``n`` of a seed is always the same, whatever has run before it.  The first failure ends the run with a
command that repeats this case alone.  A short run is among the tests (``test_stress.py``).

Each result must have norms within 1e-7, or 1e-11 if all is small, plus the rounding to the returned dtype;
gradients within two units in the last place, plus the effect of that difference of the norms; and unchanged
bits in gradients that need no clipping, and in the memory between the elements of a view.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torchclip
from torchclip import kernel, reference

Array = np.ndarray[Any, Any]

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
DOUBLE = {torch.float64, torch.complex128}
ORDERS = [1, 1.0, 3, 0.5, 1.5, 10.0, math.inf, "inf", -math.inf, 0, -1, -2.0]
EXTREMES = [5e-324, 1e-200, 1e-45, 1e-40, 1e-25, 6e-8, 1.0, 300.0, 6e4, 1e20, 3e38, 1e200, 1.7e308]
NONFINITE = [math.inf, -math.inf, math.nan]
GUARD = 7.25
"""Lies in memory around the elements of a view, and must still be there afterwards."""


class Wrong(AssertionError):
    """A result that differs from its twin's."""


class Subclass(Tensor):
    """A tensor of another type."""


@dataclass
class Gradient:
    """A gradient, and the data to check it afterwards.

    Attributes:
        tensor: as a user has it.
        held: its elements in this process, where that is another tensor.
        memory: what the elements lie in, and which of it is theirs.
        stored: for a sparse one, which elements it stores.
        summed: for one with several entries for a place, the sums of their magnitudes.
    """

    tensor: Tensor
    held: Tensor
    memory: tuple[Tensor, Tensor] | None = None
    stored: Array | None = None
    summed: Array | None = None
    before: Array = field(init=False)

    def __post_init__(self) -> None:
        self.before = values_of(self.held)

    def check(self, expected: Array, norm_error: float) -> None:
        """Raise :class:`Wrong` unless the gradient is as expected, up to rounding."""
        if self.memory is not None:
            memory, mine = self.memory
            if not bool((memory[~mine] == GUARD).all()):
                raise Wrong("memory between the elements of a view has changed")
        if self.stored is not None:
            expected = np.where(self.stored, expected, 0)
        info = torch.finfo(self.held.dtype)
        absolute: Any = 2 * info.smallest_normal * info.eps
        if self.summed is not None:
            absolute = absolute + 8 * info.eps * self.summed
        compare(values_of(self.held), expected, 2 * info.eps + norm_error, absolute, self.describe())

    def check_untouched(self) -> None:
        """Raise :class:`Wrong` if a bit of the gradient has changed."""
        now = values_of(self.held)
        if now.tobytes() != self.before.tobytes() and not np.array_equal(now, self.before, equal_nan=True):
            raise Wrong(f"{self.describe()} should be unchanged, but is not")
        self.check(self.before, 0.0)

    def describe(self) -> str:
        """A description for a message."""
        t = self.tensor
        strides = f", strides {self.held.stride()}" if self.held.layout == torch.strided else ""
        return f"a gradient ({type(t).__name__}, {t.layout}, {t.dtype}, shape {tuple(t.shape)}{strides})"


def values_of(tensor: Tensor) -> Array:
    """A copy of the elements, duplicates added up; NumPy has no bfloat16, float32 holds its numbers."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        coo = tensor.to_sparse().coalesce()
        # Torch's to_dense() multiplies complex numbers by 1, which makes NaN of some.
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
        tensor[tuple(coo.indices())] = coo.values()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    copy: Array = tensor.resolve_conj().resolve_neg().numpy().copy()
    return copy


def compare(actual: Any, expected: Any, relative: float, absolute: Any, what: str) -> None:
    """Raise :class:`Wrong` unless the parts of all numbers are close, inf and NaN the same."""
    if np.iscomplexobj(expected):
        # For a complex number that is not finite, it does not matter which part is which.
        finite = np.isfinite(actual) | np.isfinite(expected)
        for part in ("real", "imag"):
            a, e = (np.where(finite, getattr(array, part), math.nan) for array in (actual, expected))
            compare(a, e, relative, absolute, f"{what}, {part}")
        return
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        good = np.abs(a - e) <= absolute + relative * np.abs(e)
    good |= (a == e) | (np.isnan(a) & np.isnan(e))
    # At the end of a dtype's range a rounding error is the difference between its largest number and inf.
    largest = float(np.finfo(np.asarray(actual).dtype).max) * (1 - 2 * relative)
    good |= (np.abs(a) >= largest) & (np.abs(e) >= largest) & (np.sign(a) == np.sign(e))
    if not good.all():
        at = tuple(int(i[0]) for i in np.nonzero(~good)) if good.ndim else ()
        raise Wrong(f"{what}: {a[at]!r} at {at}, expected {e[at]!r} ({(~good).sum()} of {good.size} wrong)")


# Drawing


class Draw:
    """Draws everything random in one case.

    Args:
        seed: of the run.
        case: which case of the run.
        mesh: a device mesh of this one process, for DTensors.
    """

    def __init__(self, seed: int, case: int, mesh: Any) -> None:
        self.rng = np.random.default_rng([seed, case])
        self.mesh = mesh if self.chance(0.05) else None
        self.large = self.chance(0.005)
        self.nonfinite = self.chance(0.1)
        self.extreme = self.chance(0.25)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def among(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def up_to(self, most: int) -> int:
        """A number from 0 to ``most``, small ones more often."""
        return int(self.rng.random() ** 3 * (most + 1))

    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of one model."""
        return [self.among(REAL + COMPLEX) for _ in range(3)] if self.chance(0.4) else [self.among(REAL)]

    def shape(self) -> list[int]:
        sizes = [0, 1, 1, 2, 3, 5, 8, 17] if self.chance(0.2) else [1, 2, 3, 4, 5, 8, 17]
        shape = [self.among(sizes) for _ in range(self.among([0, 1, 1, 2, 2, 3, 4]))]
        while math.prod(shape) > 500:
            shape.pop()
        if self.large and self.chance(0.3):
            shape = [self.among([1000, 4096, 70_001, 131_072]), *([self.among([2, 5, 17])] * self.up_to(1))]
        return shape

    def order(self) -> float | str:
        return 2.0 if self.chance(0.6) else self.among(ORDERS)

    def limit(self, norm: float) -> float:
        """A threshold: mostly about a norm."""
        kind = self.rng.random()
        if kind < 0.7 and math.isfinite(norm):
            return float(norm * self.rng.uniform(0.01, 2.0))
        fixed = [0, 0.0, 1, 1.0, 1e-30, 1e30, math.inf]
        return float(10 ** self.rng.uniform(-8, 8)) if kind < 0.9 else self.among(fixed)

    def numbers(self, count: int, dtype: torch.dtype, tame: bool = False) -> Tensor:
        """Values from denormal to huge, with zeros, and sometimes with inf and NaN."""
        parts = count * (2 if dtype.is_complex else 1)
        largest = torch.finfo(dtype).max
        if tame or not self.extreme or self.chance(0.3):
            scale = 1.0 if tame else 10 ** self.rng.uniform(-5, 3)
            numbers = self.rng.standard_normal(parts) * scale
        else:
            pool = np.array([v for v in EXTREMES if v <= largest])
            some = self.rng.choice(pool, min(len(pool), 1 + self.up_to(5)))
            numbers = self.rng.choice(some, parts) * self.rng.choice([1.0, -1.0], parts)
        if self.chance(0.1):
            numbers[self.rng.random(parts) < 0.7] = self.among([0.0, -0.0])
        if self.chance(0.05):
            numbers[:] = numbers[:1] if parts else 0.0
        if self.nonfinite and parts and self.chance(0.3):
            numbers[self.rng.integers(parts)] = self.among(NONFINITE)
        wide = numbers.view(np.complex128) if dtype.is_complex else numbers
        return torch.from_numpy(wide).to(dtype)

    # Gradients

    def gradient(self, dtype: torch.dtype, kinds: Sequence[str]) -> Gradient:
        """A gradient of a random kind."""
        kind = self.among(kinds)
        make: Callable[[torch.dtype], Gradient] = getattr(self, f"_{kind}")
        made = make(dtype)
        plain = made.memory is not None or made.tensor.layout == torch.strided
        if self.mesh is not None and plain and not made.tensor.is_conj() and self.chance(0.5):
            return self._distributed(made)
        return made

    def _contiguous(self, dtype: torch.dtype) -> Gradient:
        shape = self.shape()
        tensor = self.numbers(math.prod(shape), dtype).view(shape)
        return Gradient(tensor, tensor)

    def _view(self, dtype: torch.dtype) -> Gradient:
        shape = self.shape()
        steps = [self.among([1, 1, 1, 2, 3]) for _ in shape]
        full = [size * step for size, step in zip(shape, steps, strict=True)]
        offset = self.up_to(9)
        memory = torch.full((offset + math.prod(full) + self.up_to(9),), GUARD, dtype=dtype)
        places = torch.zeros(len(memory), dtype=torch.bool)
        order = tuple(self.rng.permutation(len(shape)).tolist())

        def view(of: Tensor) -> Tensor:
            within = of[offset : offset + math.prod(full)].view(full)
            return within[tuple(slice(None, None, step) for step in steps)].permute(order)

        view(places).fill_(True)
        tensor = view(memory)
        tensor.copy_(self.numbers(tensor.numel(), dtype).view(tensor.shape))
        return Gradient(tensor, tensor, (memory, places))

    def _lazy(self, dtype: torch.dtype) -> Gradient:
        """A tensor that is read conjugated or negated."""
        base = self._view(dtype if dtype.is_complex else torch.complex64).tensor.conj()
        tensor = base if dtype.is_complex else base.imag
        return Gradient(tensor, tensor)

    def _subclass(self, dtype: torch.dtype) -> Gradient:
        plain = self._view(dtype)
        return Gradient(plain.tensor.as_subclass(Subclass), plain.tensor, plain.memory)

    def _sparse(self, dtype: torch.dtype) -> Gradient:
        shape = [1 + self.up_to(8) for _ in range(self.among([1, 2, 3]))]
        return self._with_entries(dtype, shape, 1 + self.up_to(len(shape) - 1))

    def _rows(self, dtype: torch.dtype) -> Gradient:
        """Sparse with whole rows, like an embedding's."""
        return self._with_entries(dtype, [1 + self.up_to(8), 1 + self.up_to(8)], 1)

    def _with_entries(self, dtype: torch.dtype, shape: list[int], sparse_dims: int) -> Gradient:
        entries = self.up_to(12)
        at = np.stack([self.rng.integers(n, size=entries) for n in shape[:sparse_dims]])
        places = torch.from_numpy(at)
        each = shape[sparse_dims:]
        values = self.numbers(entries * math.prod(each), dtype, tame=True).view(entries, *each)
        tensor = torch.sparse_coo_tensor(places, values, shape, check_invariants=True)
        magnitudes = values.abs().nan_to_num(posinf=0.0).double()
        summed = torch.sparse_coo_tensor(places, magnitudes, shape, check_invariants=True)
        ones = torch.sparse_coo_tensor(places, torch.ones(values.shape), shape, check_invariants=True)
        tensor = tensor.coalesce() if self.chance(0.5) else tensor
        stored = ones.to_dense().numpy() > 0
        return Gradient(tensor, tensor, None, stored, summed.to_dense().numpy())

    def _compressed(self, dtype: torch.dtype) -> Gradient:
        shape = [1 + self.up_to(8), 1 + self.up_to(8)]
        dense = self.numbers(math.prod(shape), dtype).view(shape)
        dense[torch.from_numpy(self.rng.random(shape) < 0.5)] = 0
        tensor = dense.to_sparse_csr()
        return Gradient(tensor, tensor, None, (dense != 0).numpy())

    def _distributed(self, plain: Gradient) -> Gradient:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placement = Shard(self.up_to(plain.held.dim() - 1)) if plain.held.dim() else Replicate()
        placement = placement if self.chance(0.7) else Replicate()
        tensor = DTensor.from_local(plain.held, self.mesh, [placement], run_check=False)
        return Gradient(tensor, plain.held, plain.memory)

    # Models

    def count(self) -> int:
        """The number of gradients: mostly a few, sometimes thousands."""
        if self.chance(0.002):
            return 1 + self.up_to(4999)
        return 1 + self.up_to(60 if self.chance(0.1) else 6)

    def model(self, kinds: Sequence[str], dtypes: Sequence[torch.dtype] | None = None) -> Model:
        """Parameters with gradients, some without one, some listed twice."""
        dtypes = dtypes or self.dtypes()
        gradients = [self.gradient(self.among(dtypes), kinds) for _ in range(self.count())]
        return Model(gradients, [self._parameter(g.tensor) for g in gradients])

    def _parameter(self, grad: Tensor) -> Tensor:
        if type(grad) is Tensor and grad.layout != torch.sparse_csr:
            value = self.numbers(grad.numel(), grad.dtype).view(grad.shape)
        else:  # what is sharded, compressed or of another type is so as a parameter, too
            value = grad.detach().clone()
        parameter = nn.Parameter(value)
        parameter.grad = grad
        return parameter

    def listed(self, parameters: list[Tensor]) -> Any:
        """The parameters as a user may pass them."""
        if self.chance(0.1):
            parameters = [*parameters, self.among(parameters)]
        if self.chance(0.1):
            parameters = [nn.Parameter(torch.zeros(2)), *parameters]
        if len(parameters) == 1 and self.chance(0.3):
            return parameters[0]
        return self.among([list, tuple, iter, nn.ParameterList])(parameters)


@dataclass
class Model:
    """Gradients and the parameters that they belong to."""

    gradients: list[Gradient]
    parameters: list[Tensor]

    def before(self) -> list[Array]:
        """Copies of the gradients for a twin to work on."""
        return [g.before.copy() for g in self.gradients]

    def values(self) -> list[Array]:
        """Copies of the parameters' values."""
        locals_ = [p.to_local() if hasattr(p, "to_local") else p for p in self.parameters]
        return [values_of(p) for p in locals_]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that norms are returned in."""
        return torch.float64 if any(g.tensor.dtype in DOUBLE for g in self.gradients) else torch.float32

    @cached_property
    def norm_error(self) -> float:
        """The allowed relative error of a norm in float64."""
        return 1e-7 if any(g.held.numel() > 30_000 for g in self.gradients) else 1e-11

    @cached_property
    def smallest_norm(self) -> float:
        """An additional allowed error: the twin rounds denormal magnitudes to few digits."""
        info = torch.finfo(self.dtype)
        return info.smallest_normal * info.eps * (2 + sum(g.before.size for g in self.gradients))

    def check(self, expected: Sequence[Array]) -> None:
        for gradient, array in zip(self.gradients, expected, strict=True):
            gradient.check(array, self.norm_error)

    def check_untouched(self) -> None:
        for gradient in self.gradients:
            gradient.check_untouched()

    def check_norms(self, actual: Tensor, expected: float | Sequence[float]) -> None:
        array = np.asarray(expected, dtype=np.float64)
        if actual.dtype != self.dtype or actual.shape != array.shape or actual.requires_grad:
            raise Wrong(f"the norm is {actual!r}, expected {self.dtype} of shape {array.shape}")
        error = self.norm_error + torch.finfo(self.dtype).eps
        compare(actual.numpy(), array, error, self.smallest_norm, "the norm")


# The calls

PLAIN = ["contiguous", "contiguous", "view", "view", "view"]
DENSE = [*PLAIN, "lazy", "subclass"]
ANY = [*DENSE, *DENSE, "sparse", "compressed"]


def refused(call: Callable[[], object], error: type[Exception], model: Model) -> None:
    """The call must fail and change nothing."""
    try:
        call()
    except error:
        model.check_untouched()
        return
    raise Wrong(f"should have raised {error.__name__}")


def clip_grad_norm(draw: Draw) -> None:
    model, order = draw.model(ANY), draw.order()
    arrays = model.before()
    limit = draw.limit(reference.global_norm(arrays, order))
    expected = reference.clip_grads(arrays, limit, order)
    listed = draw.listed(model.parameters)
    if draw.chance(0.1) and not math.isfinite(expected):
        refused(lambda: torchclip.clip_grad_norm_(listed, limit, order, True), RuntimeError, model)
        return
    model.check_norms(torchclip.clip_grad_norm_(listed, limit, order), expected)
    if reference.clip_coefficient(limit, expected * (1 + model.norm_error)) >= 1:
        model.check_untouched()
    model.check(arrays)


def get_total_norm(draw: Draw) -> None:
    model, order = draw.model(ANY), draw.order()
    tensors = [g.tensor for g in model.gradients]
    model.check_norms(torchclip.get_total_norm(tensors, order), reference.global_norm(model.before(), order))
    model.check_untouched()


def clip_grads_with_norm(draw: Draw) -> None:
    model, order = draw.model(ANY), draw.order()
    total_norm = torchclip.get_total_norm([g.tensor for g in model.gradients], order)
    arrays, limit = model.before(), draw.limit(float(total_norm))
    reference.clip_grads_with_norm(arrays, limit, float(total_norm))
    passed = total_norm if draw.chance(0.5) else float(total_norm)
    torchclip.clip_grads_with_norm_(draw.listed(model.parameters), limit, passed)
    model.check(arrays)


def clip_grad_value(draw: Draw) -> None:
    model = draw.model(ANY)
    limit = draw.limit(1.0)
    if any(g.tensor.is_complex() for g in model.gradients):
        refused(lambda: torchclip.clip_grad_value_(model.parameters, limit), TypeError, model)
        return
    arrays = model.before()
    reference.clip_grad_value(arrays, limit)
    torchclip.clip_grad_value_(draw.listed(model.parameters), limit)
    model.check(arrays)


def clip_grad_norm_per_parameter(draw: Draw) -> None:
    model, order = draw.model(ANY), draw.order()
    arrays = model.before()
    limit = draw.limit(reference.global_norm(arrays, order))
    expected = reference.clip_grad_norm_per_parameter(arrays, limit, order)
    listed = draw.listed(model.parameters)
    model.check_norms(torchclip.clip_grad_norm_per_parameter_(listed, limit, order), expected)
    model.check(arrays)


def clip_grad_adaptive(draw: Draw) -> None:
    model, order = draw.model([*DENSE, *DENSE, "rows"]), draw.order()
    arrays, factor = model.before(), draw.limit(draw.among([0.01, 1.0]))
    eps = draw.among([1e-3, 0.0, 1, draw.limit(1.0)])
    reference.clip_grad_adaptive(model.values(), arrays, factor, eps, order)
    torchclip.clip_grad_adaptive_(draw.listed(model.parameters), factor, eps, order)
    model.check(arrays)


def clip_per_example(draw: Draw) -> None:
    examples, dtypes = draw.up_to(8), draw.dtypes()
    shapes = [[examples, *draw.shape()] for _ in range(1 + draw.up_to(4))]
    grads = []
    for shape in shapes:
        tame = draw.chance(0.7)
        grad = draw.numbers(math.prod(shape), draw.among(dtypes), tame).view(shape)
        grads.append(grad.flip(-1).flip(-1) if draw.chance(0.2) else grad)
    arrays = [values_of(g) for g in grads]
    of_examples = [reference.global_norm([a[i : i + 1] for a in arrays]) for i in range(examples)]
    limit = draw.limit(draw.among(of_examples) if of_examples else 1.0)
    expected, clipped = reference.clip_per_example(arrays, limit)
    sums, count = torchclip.clip_per_example(grads, limit)
    if int(count) != clipped:
        raise Wrong(f"{int(count)} examples clipped, expected {clipped}")
    for actual, wanted, array in zip(sums, expected, arrays, strict=True):
        rates = [reference.clip_coefficient(limit, n) for n in of_examples]
        with np.errstate(invalid="ignore", over="ignore"):
            terms = [abs(r * a.astype(np.complex128)) for r, a in zip(rates, array, strict=True)]
            summed = np.nan_to_num(sum(terms, np.zeros(array.shape[1:])), nan=0.0, posinf=0.0)
        wide, own = (torch.finfo(d) for d in (torch.promote_types(actual.dtype, torch.float32), actual.dtype))
        # Sums are formed in float32: near its end, parts of opposite sign may overflow on the way.
        absolute = np.where(summed > wide.max / 2, math.inf, 16 * wide.eps * summed)
        wanted = np.where(np.isinf(absolute), 0, wanted).astype(wanted.dtype)
        values = np.where(np.isinf(absolute), 0, values_of(actual)).astype(wanted.dtype)
        # So are the factors: one below its range counts as 0.
        with np.errstate(over="ignore", invalid="ignore"):
            least = abs(array.astype(np.complex128)) * wide.smallest_normal * wide.eps
            lost = np.nan_to_num(least.sum(axis=0), nan=0.0, posinf=0.0)
        absolute = absolute + lost + 2 * own.smallest_normal * own.eps
        compare(values, wanted, 2 * own.eps + 1e-7, absolute, f"sums of {actual.dtype}")


CALLS: dict[str, Callable[[Draw], None]] = {
    "clip_grad_norm_": clip_grad_norm,
    "get_total_norm": get_total_norm,
    "clip_grads_with_norm_": clip_grads_with_norm,
    "clip_grad_value_": clip_grad_value,
    "clip_grad_norm_per_parameter_": clip_grad_norm_per_parameter,
    "clip_grad_adaptive_": clip_grad_adaptive,
    "clip_per_example": clip_per_example,
}
WEIGHTS = np.array([5, 2, 2, 2, 2, 2, 2])


# Running


def backends() -> list[str]:
    """Torch operations, and the kernel with each instruction set of this machine."""
    found = ["torch operations"]
    if not kernel.status().startswith("active"):
        return found
    from torchclip._core.native import extension as _kernel

    for name in ("avx512", "avx2", "baseline"):
        with contextlib.suppress(ValueError):
            _kernel.select(name)
            found.append(name)
    _kernel.select(None)
    return found


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Everything through one of the :func:`backends`."""
    if backend == "torch operations":
        with kernel.disabled():
            yield
        return
    from torchclip._core.native import extension as _kernel

    _kernel.select(backend)
    try:
        yield
    finally:
        _kernel.select(None)


def run_case(seed: int, case: int, mesh: Any = None) -> str:
    """Run one case and return its description; raises :class:`Wrong` or another exception if it fails."""
    draw = Draw(seed, case, mesh)
    backend = draw.among(backends())
    threads = draw.among([1, 1, 1, 2, 2, 3, 4])
    name = draw.rng.choice(list(CALLS), p=WEIGHTS / WEIGHTS.sum())
    torch.set_num_threads(threads)
    what = f"{name}, {backend}, {threads} threads"
    try:
        with using(backend):
            CALLS[name](draw)
    except Exception as error:
        error.add_note(what) if sys.version_info >= (3, 11) else None
        raise
    return what


@contextlib.contextmanager
def mesh_of_one() -> Iterator[Any]:
    """A device mesh of this process alone, for as long as the block lasts."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def numbers_of(first: int, cases: int | None, seconds: float | None) -> Iterator[int]:
    """The numbers of the cases, until there are enough or the time is over."""
    end = math.inf if seconds is None else time.monotonic() + seconds
    for case in itertools.count(first) if cases is None else range(first, first + cases):
        if time.monotonic() >= end:
            return
        yield case


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Compare random calls of torchclip's functions on random models with their NumPy twins."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--cases", type=int, help="how many cases (default: until the time is up)")
    parser.add_argument("--seconds", type=float, help="for how long (default: 60, unless --cases is given)")
    options = parser.parse_args(arguments)
    seconds = 60.0 if options.seconds is None and options.cases is None else options.seconds
    print(f"torch {torch.__version__}, kernel {kernel.status()}, backends: {', '.join(backends())}")
    started, counts, case = time.monotonic(), dict.fromkeys(CALLS, 0), options.first
    with warnings.catch_warnings(), mesh_of_one() as mesh:
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        try:
            for case in numbers_of(options.first, options.cases, seconds):
                counts[run_case(options.seed, case, mesh).split(",")[0]] += 1
        except KeyboardInterrupt:
            pass
        except Exception as error:
            if not isinstance(error, Wrong):
                traceback.print_exc()
            notes = "; ".join(getattr(error, "__notes__", []))
            print(f"case {case} of seed {options.seed} is wrong ({notes}): {type(error).__name__}: {error}")
            print(f"repeat it: python {sys.argv[0]} --seed {options.seed} --first {case} --cases 1")
            return 1
    total = sum(counts.values())
    print(f"{total:,} cases of seed {options.seed} right, in {time.monotonic() - started:.0f} s: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
