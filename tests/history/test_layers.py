"""The norms of single parameters over a run: what is kept, what is read, and the picture of it."""

import copy
import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import readers

from torchclip.history import History
from torchclip.history.layers import Layers

INF, NAN = math.inf, math.nan
NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "head.weight"]


def layers_of(steps: range, maxlen: int = 500) -> Layers:
    layers = Layers(maxlen)
    for step in steps:
        layers.append(step, NAMES, [step + 0.1 * i for i in range(4)])
    return layers


def test_what_is_kept_is_what_was_given() -> None:
    layers = layers_of(range(0, 50, 10))
    assert layers.names == NAMES
    assert layers.steps == [0, 10, 20, 30, 40]
    assert layers.norms.shape == (5, 4)
    assert layers.norms.dtype == np.float64
    np.testing.assert_array_equal(layers.norms[2], [20, 20.1, 20.2, 20.3])
    assert len(layers) == 5


def test_nothing_kept() -> None:
    layers = Layers()
    assert (layers.names, layers.steps, layers.norms.shape, len(layers)) == ([], [], (0, 0), 0)


@pytest.mark.parametrize("maxlen", [10, 11])
@pytest.mark.parametrize("count", [1, 10, 11, 12, 20, 21, 22, 399, 1000])
def test_the_memory_is_bounded_and_the_whole_run_stays(count: int, maxlen: int) -> None:
    layers = layers_of(range(0, 3 * count, 3), maxlen)
    steps = layers.steps
    assert len(steps) <= maxlen
    assert steps[0] == 0
    apart = {later - earlier for earlier, later in itertools.pairwise(steps)}
    assert len(apart) <= 1
    assert not apart or steps[-1] + apart.pop() > 3 * (count - 1)
    np.testing.assert_array_equal(layers.norms[:, 0], steps)


def test_no_gradient_is_0_and_what_is_not_finite_stays_so() -> None:
    layers = Layers()
    layers.append(0, NAMES, [-1.0, INF, NAN, 0.5])
    np.testing.assert_array_equal(layers.norms, [[0.0, INF, NAN, 0.5]])


def test_parameters_that_come_later_or_are_away() -> None:
    layers = Layers()
    layers.append(0, ["a", "b"], [1.0, 2.0])
    layers.append(1, ["b"], [3.0])
    layers.append(2, ["b", "c", "a"], torch.tensor([4.0, 5.0, 6.0]))
    assert layers.names == ["a", "b", "c"]
    np.testing.assert_array_equal(layers.norms, [[1, 2, 0], [0, 3, 0], [6, 4, 5]])


def test_appending_reads_no_value() -> None:
    layers = Layers(maxlen=4)
    meta = torch.ones(4, dtype=torch.float64, device="meta")
    for step in range(300):
        layers.append(step, NAMES, meta)
    assert layers.steps == [0, 128, 256]
    assert layers.names == NAMES


def test_tensors_are_fetched_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, stacked, stack = Layers(), [], torch.stack

    def counting(tensors: list[torch.Tensor]) -> torch.Tensor:
        stacked.append(len(tensors))
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", counting)
    for step in range(20):
        layers.append(step, NAMES, torch.full((4,), float(step), dtype=torch.float64))
    np.testing.assert_array_equal(layers.norms[:, 3], range(20))
    assert layers.norms.shape == (20, 4)
    assert stacked == [20]


def duplicate_by_state(history: History) -> History:
    other = History()
    other.layers.append(0, ["other"], [1.0])  # is replaced
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    return other


@pytest.mark.parametrize(
    "duplicate", [duplicate_by_state, copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))]
)
@pytest.mark.parametrize("stop", [3, 499, 501, 1003])
def test_a_resumed_history_keeps_the_same_layers(duplicate: Callable[[History], History], stop: int) -> None:
    uninterrupted, first = History(), History()
    for step in range(1500):
        uninterrupted.layers.append(step, NAMES, [step, NAN, INF, -1.0])
        if step < stop:
            first.layers.append(step, NAMES, torch.tensor([step, NAN, INF, -1.0]).double())
    second = duplicate(first)
    for step in range(stop, 1500):
        second.layers.append(step, NAMES, [step, NAN, INF, -1.0])
    assert second.layers.names == uninterrupted.layers.names
    assert second.layers.steps == uninterrupted.layers.steps
    np.testing.assert_array_equal(second.layers.norms, uninterrupted.layers.norms)
    assert len(first.layers) == len(layers_of(range(stop)))


def test_another_thread_reads_whole_rows() -> None:
    layers = Layers(maxlen=20)
    with readers(layers.read) as found:
        for step in range(3000):
            layers.append(step, NAMES, torch.full((4,), float(step), dtype=torch.float64))
    for _, steps, norms in found:
        assert norms.shape == ((len(steps), 4) if steps else (0, 0))
        assert all((row == step).all() for step, row in zip(steps, norms, strict=True))


# --- the picture -------------------------------------------------------------------------------------------


def picture(names: list[str], norms: Any, path: Path) -> Any:
    history = History()
    for step, row in enumerate(norms):
        history.layers.append(10 * step, names, list(row))
    figure = history.plot_layers(path)
    from matplotlib.image import imread

    assert imread(path).std() > 0.05
    return figure


def test_a_few_parameters_have_their_names_and_a_log_scale(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    norms = np.geomspace(1e-3, 1e3, 20 * 4).reshape(20, 4)
    norms[5, 1], norms[7, 2], norms[9] = NAN, INF, 0.0
    figure = picture(NAMES, norms, tmp_path / "layers.png")
    axes, colors = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == NAMES
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first parameter is at the top"
    assert colors.get_yscale() == "log"
    mesh = axes.collections[0]
    shown: Any = mesh.get_array().T
    np.testing.assert_array_equal(np.asarray(shown[0]), norms[0])
    assert np.argwhere(shown > mesh.norm.vmax).tolist() == [[5, 1], [7, 2]], (
        "in the color of what is too large"
    )
    assert shown.mask[9].all()
    (marks,) = (line for line in axes.lines if line.get_marker() == "v")
    assert marks.get_xdata().tolist() == [50, 70]
    assert "not finite (2 of 20 steps)" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("blocks", [23, 200])
def test_of_hundreds_of_parameters_some_have_their_names(blocks: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["embed.weight", *(f"body.layers.{i}.{part}" for i in range(blocks) for part in "abcd")]
    rng = np.random.default_rng(0)
    figure = picture(names, rng.lognormal(size=(30, len(names))), tmp_path / "layers.png")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == names[:: 3 if blocks == 23 else 18]
    heights = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    overlaps = [a.overlaps(b) for a, b in itertools.pairwise(heights)]
    assert not any(overlaps), "labels can be read"


def test_parameters_without_names_and_very_long_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [f"param_groups[0]['params'][{i}]" for i in range(60)] + ["a." * 60 + "weight"]
    picture(names, np.ones((2, 61)), tmp_path / "layers.png")


@pytest.mark.parametrize("norms", [[], [[NAN] * 4], [[0.0] * 4], [[1.0] * 4], [[-1.0, INF, 0.0, 1.0]]])
def test_little_to_show(norms: list[list[float]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History()
    for row in norms:
        history.layers.append(0, NAMES, row)
    history.plot_layers(tmp_path / "layers.png")
