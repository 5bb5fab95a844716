"""Clipper: the same as the functions with every optimizer; attaching, detaching, looking at it."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clipper_helpers import (
    NAN,
    OPTIMIZERS,
    Net,
    backward,
    equal,
    fused_or_not,
    grad_norms,
    gradients,
    sgd,
    takes,
    train,
    two_groups,
)
from helpers import last_of, with_gradients
from torch import Tensor, nn

import torchclip
from torchclip import AdaGC, Adaptive, Clipper, Percentile, Value
from torchclip._core import gather
from torchclip.clipper import Scope

pytestmark = pytest.mark.usefixtures("each_way")

WAYS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}}
STEPS = 8  # RAdam begins to adapt in the sixth
NO_MODELS: list[Any] = [1, "model", [nn.Linear(1, 1), None], nn.Linear, [[nn.Linear(1, 1)]]]


def test_every_optimizer_of_torch_is_here() -> None:
    members = vars(torch.optim).values()
    classes = {m.__name__ for m in members if isinstance(m, type) and issubclass(m, torch.optim.Optimizer)}
    assert classes - {"Optimizer"} == set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "way"), [(n, w) for n in OPTIMIZERS for w in WAYS if takes(n, WAYS[w])])
def test_every_optimizer_ends_where_the_function_leads_it(name: str, way: str) -> None:
    sparse = name == "SparseAdam"
    models = [Net(sparse), Net(sparse)]
    if sparse:
        models = [m.requires_grad_(False) for m in models]
        for model in models:
            model.embedding.requires_grad_(True)
    plain, clipped = (
        getattr(torch.optim, name)(
            [p for p in m.parameters() if p.requires_grad], **OPTIMIZERS[name], **WAYS[way]
        )
        for m in models
    )
    clipper = Clipper(clipped, 0.5)

    def clip() -> Tensor:
        return torchclip.clip_grad_norm_(plain.param_groups[0]["params"], 0.5)

    if name == "LBFGS":
        for step in range(STEPS):
            plain.step(lambda step=step: (backward(models[0], plain, step), clip())[0])
            clipped.step(lambda step=step: backward(models[1], clipped, step))
    else:
        train(models[0], plain, range(STEPS), clip)
        train(models[1], clipped, range(STEPS))
    summary = clipper.history.summary()
    assert summary.clipped > 0.8 * STEPS
    assert summary.nonfinite == 0
    assert equal(*models)


@fused_or_not
def test_a_default_device_elsewhere_does_not_matter(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    clipper = Clipper(optimizer, 1.0)
    with torch.device("meta"):
        optimizer.step()
    assert last_of(clipper).total_norm == 5.0
    assert gradients(optimizer)[0].tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("global", ["all"]),
        ("group", ["group 0", "group 1"]),
        ("parameter", ["group 0, parameter 0", "group 1, parameter 0"]),
    ],
)
def test_what_the_threshold_objects_have_learned(scope: Scope, names: list[str]) -> None:
    optimizer = two_groups()
    clipper = Clipper(optimizer, Percentile(50, warmup=1), scope=scope)
    learned = {name: threshold.state_dict()["norms"] for name, threshold in clipper.thresholds.items()}
    assert learned == {name: [] for name in names}
    optimizer.step()
    assert list(clipper.thresholds) == names
    for threshold, norm in zip(
        clipper.thresholds.values(), [125**0.5] if scope == "global" else [5, 10], strict=True
    ):
        assert isinstance(threshold, Percentile)
        assert threshold.state_dict()["norms"] == pytest.approx([norm])
    with pytest.raises(TypeError):
        clipper.thresholds["all"] = Percentile()  # type: ignore[index]
    its_clipper = Clipper(two_groups(), Percentile(50), scope=scope)
    its_clipper.load_state_dict(clipper.state_dict())
    assert list(its_clipper.thresholds) == names
    assert Clipper(two_groups(), 1.0).thresholds == {}


def test_norms_are_by_name_and_largest_first() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    clipper = Clipper(optimizer, 1.0)
    for parameter, value in zip(model.parameters(), (1.0, NAN, 2.0), strict=True):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = value
    norms = clipper.norms()
    assert list(norms) == ["inner.weight", "outer.weight", "embedding.weight"]
    assert list(norms.values())[1:] == [2.0, 1.0]


def test_detach_and_with() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    with Clipper(optimizer, 1.0) as clipper:
        optimizer.step()
        assert grad_norms(optimizer) == pytest.approx([1.0])
    optimizer.param_groups[0]["params"][0].grad.mul_(5)
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([5.0])
    assert len(clipper.history) == 1
    with Clipper(optimizer, 2.0):
        clipper.detach()  # a second time: without effect on the new one
        with pytest.raises(ValueError, match="already has a Clipper"):
            Clipper(optimizer, 1.0)
        optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([2.0])


def test_a_clipper_that_nobody_holds_goes_on_clipping() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    Clipper(optimizer, 1.0)
    gc.collect()
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer"}, r"`scope` must be one of 'global', .* got 'layer'"),
        ({"nonfinite": None}, "`nonfinite` must be one of 'propagate', 'error'"),
        ({"norm_type": NAN}, "norm_type"),
        ({"norm_type": "two"}, "norm_type"),
        ({"on_clip": 1}, "`on_clip` must be callable"),
        ({"max_norm": -1.0}, "`max_norm` must be at least 0"),
        ({"max_norm": NAN}, "`max_norm` must be at least 0"),
        ({"max_norm": "abc"}, "max_norm"),
        ({"max_norm": None}, "max_norm"),
        ({"max_norm": True}, "max_norm"),
        ({"max_norm": Percentile}, r"the class Percentile; pass an object of it, such as Percentile\(\)"),
        ({"max_norm": Value}, "the class Value; pass an object of it"),
        ({"max_norm": SimpleNamespace(update=float)}, "a threshold object needs all three"),
        ({"skip_above": Percentile}, "`skip_above` is the class Percentile; pass an object"),
        ({"skip_above": Adaptive(0.1)}, "`skip_above`"),
        ({"skip_above": -1.0}, "`skip_above` must be at least 0"),
        ({"skip_above": "abc"}, "`skip_above`"),
        ({"skip_above": [1.0]}, "`skip_above`"),
        ({"skip_above": 1.0, "max_skips": 0}, "`max_skips` must be at least 1"),
        ({"skip_above": 1.0, "max_skips": 1.5}, "`max_skips`"),
        ({"max_skips": 1}, "`max_skips` limits how many steps in a row"),
        ({"max_norm": AdaGC(), "group": object()}, "`group` has no meaning with AdaGC"),
        *(({"layers_every": value}, "`layers_every`") for value in (-1, 1.5, "1", None, True)),
        *(({"model": value}, r"`model` must be a torch\.nn\.Module or a list") for value in NO_MODELS),
        ({"nonfinite": "error", "norm_type": 0}, "`nonfinite='error'`.*pass an order above 0.*'propagate'"),
        ({"nonfinite": "skip", "norm_type": -1}, "`nonfinite='skip'`.*pass an order above 0"),
        ({"nonfinite": "zero", "norm_type": "-inf"}, "`nonfinite='zero'`.*pass an order above 0"),
    ],
)
def test_misuse_is_refused_and_leaves_the_optimizer_as_it_was(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_groups = lambda group: None if group is None else [group]  # noqa: E731
    monkeypatch.setattr("torchclip._core.ranks.meshes.as_groups", as_groups)
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    with pytest.raises((TypeError, ValueError), match=message):
        Clipper(optimizer, **{"max_norm": 1.0, **options})
    optimizer.step()
    assert grad_norms(optimizer) == [5.0]
    Clipper(optimizer, 1.0)


class _WithPlainHooks(torch.optim.Optimizer):
    """Like wrappers that never call ``Optimizer.__init__`` and keep hooks in plain dictionaries."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer, self.state, self.defaults = inner, {}, inner.defaults  # type: ignore[assignment]
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda o, model: None, r"`optimizer` must be a torch\.optim\.Optimizer"),
        (lambda o, model: SimpleNamespace(inner=o), "pass the optimizer that it wraps"),
        (lambda o, model: _WithPlainHooks(o), "pass the optimizer that it wraps"),
        (lambda o, model: model, "neither a model nor parameters"),
        (lambda o, model: model.parameters(), "neither a model nor parameters"),
        (lambda o, model: [*model.parameters()], r"item 0 .* neither a model nor parameters"),
        (lambda o, model: o.param_groups, "nor param_groups"),
        (lambda o, model: {"body": o}, r"list\(optimizers\.values\(\)\)"),
    ],
)
def test_only_optimizers_have_clippers(wrong: Any, message: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=message):
        Clipper(wrong(optimizer, model), 1.0)
    Clipper(optimizer, 1.0)


def test_repr() -> None:
    clipper = Clipper(sgd([torch.ones(1)]), Percentile(20), scope="group")
    threshold = "Percentile(percentile=20.0, window=None, warmup=0, max_norm=inf)"
    assert repr(clipper) == (
        f"Clipper(SGD, max_norm={threshold}, norm_type=2.0, scope='group', nonfinite='propagate')"
    )


def test_norms_leave_out_a_gradient_that_is_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = with_gradients([torch.tensor([3.0, 4.0]) for _ in range(2)])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clipper = Clipper(optimizer, 1.0)
    gradients = gather.gradients

    def replaced_after(*args: object, **kwargs: object) -> object:
        batch = gradients(*args, **kwargs)  # type: ignore[arg-type]
        parameters[1].grad = torch.tensor([6.0, 8.0])  # as another thread may at this moment
        return batch

    monkeypatch.setattr(gather, "gradients", replaced_after)
    assert clipper.norms() == {"param_groups[0]['params'][0]": 5.0}
    monkeypatch.undo()
    assert list(clipper.norms().values()) == [10.0, 5.0]
