"""install(), uninstall(), installed(): whose functions a program gets."""

import inspect
import pickle
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad
from torch.nn.utils import clip_grad_norm_ as early

import torchclip

NAMES = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
HOMES = [(torch.nn.utils, n) for n in NAMES] + [
    (clip_grad, n)
    for n in ["clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_", "_get_total_norm"]
]
TORCHS = [getattr(module, name) for module, name in HOMES]
HUGE = [torch.full((4,), 1e20)]  # torch's norm of it overflows


@pytest.fixture(autouse=True)
def _torchs_again() -> Iterator[None]:
    yield
    torchclip.uninstall()


def is_torchs() -> list[bool]:
    return [getattr(module, name) is original for (module, name), original in zip(HOMES, TORCHS, strict=True)]


def parameter(*grad: float) -> torch.Tensor:
    weight = torch.zeros(len(grad), requires_grad=True)
    weight.grad = torch.tensor(grad)
    return weight


def test_install_replaces_and_uninstall_puts_back_exactly_however_often() -> None:
    for _ in range(2):
        torchclip.install()
        assert not any(is_torchs())
    for _ in range(2):
        torchclip.uninstall()
        assert all(is_torchs())


def test_the_functions_are_torchclips() -> None:
    torchclip.install()
    assert torch.nn.utils.get_total_norm(HUGE) == 2e20
    for function in (torch.nn.utils.clip_grad_norm_, early):  # an old reference computes so, too
        weight = parameter(3e30, 4e30)
        assert function(weight, 1.0) == 5e30
        torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    with pytest.raises(ValueError, match="max_norm"):
        torch.nn.utils.clip_grads_with_norm_(weight, -1.0, torch.tensor(5.0))
    with pytest.raises(ValueError, match="clip_value"):
        torch.nn.utils.clip_grad_value_(weight, -1.0)


def test_a_module_lends_its_names() -> None:
    torchclip.install()
    module: Any = torch.nn.Linear(2, 2)
    module.bias.grad = torch.tensor([torch.nan, 0.0])
    with pytest.raises(RuntimeError, match=r"Non-finite: 'bias' of shape \(2,\)"):
        torch.nn.utils.clip_grad_norm_(module, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("name", NAMES)
def test_wrapped_is_what_was_there_and_the_rest_is_torchclips(name: str) -> None:
    theirs, ours = getattr(torch.nn.utils, name), getattr(torchclip, name)
    torchclip.install()
    function = getattr(torch.nn.utils, name)
    assert function.__wrapped__ is theirs
    assert inspect.signature(function) == inspect.signature(ours)
    assert function.__doc__ == ours.__doc__
    assert function.__module__.startswith("torchclip.")
    assert pickle.loads(pickle.dumps(function)) is function
    assert not hasattr(ours, "__wrapped__")


def test_what_somebody_else_put_there_is_put_back() -> None:
    def another(*args: Any, **kwargs: Any) -> Any:
        return early(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", another)
        torchclip.install()
        function: Any = torch.nn.utils.clip_grad_norm_
        assert function.__wrapped__ is another
        torchclip.uninstall()
        assert torch.nn.utils.clip_grad_norm_ is another
        assert clip_grad.clip_grad_norm_ is early


def test_names_imported_before_are_listed() -> None:
    module: Any = types.ModuleType("of_a_user")
    module.clip = early
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "of_a_user", module)
        holders = torchclip.install()
        assert "of_a_user.clip" in holders
        assert f"{__name__}.early" in holders
        assert not [name for name in holders if name.startswith("torch.nn.utils")]
        assert torchclip.install() == holders


def test_blocks_nest_and_leave_what_install_did() -> None:
    with torchclip.installed():
        with pytest.raises(KeyError), torchclip.installed():
            raise KeyError
        assert not any(is_torchs())
    assert all(is_torchs())
    with torchclip.installed():
        torchclip.install()
    assert not any(is_torchs())
    with torchclip.installed():
        torchclip.uninstall()
        assert all(is_torchs())
    assert all(is_torchs())


def test_blocks_of_threads_overlap() -> None:
    """Within a block the functions are torchclip's, whatever other threads enter and leave."""
    seen, start = [], threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with torchclip.installed():
                seen.append(torch.nn.utils.clip_grad_norm_ is not early)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800
    assert all(seen)
    assert all(is_torchs())


def test_a_warning_points_at_the_callers_line() -> None:
    nothing: list[torch.Tensor] = []
    torchclip.install()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.nn.utils.clip_grad_norm_((p for p in nothing), 1.0)
    assert [w.filename for w in caught] == [__file__]


def test_compiled_functions_follow() -> None:
    def clip(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_([weight], 1.0)

    compiled = torch.compile(clip, backend="aot_eager")  # torch 2.10 breaks the graph of its own
    assert compiled(parameter(3e30, 4e30)).isinf()
    with torchclip.installed():
        weight = parameter(3e30, 4e30)
        assert compiled(weight) == 5e30
        torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    assert compiled(parameter(3e30, 4e30)).isinf()
