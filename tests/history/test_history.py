"""The history of a run: what is recorded, what is kept, and when tensors are read."""

import copy
import csv
import json
import math
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Operations
from runs import readers

from torchclip.history import History, Record
from torchclip.history.layers import Layers
from torchclip.history.records import with_layers

NAN, INF = math.nan, math.inf
RECORDED = ("step", "total_norm", "max_norm", "clip_coef", "clipped", "nonfinite", "skipped")


def history_of(norms: Sequence[float], max_norm: float = 1.0, **options: Any) -> History:
    history = History(**options)
    for step, norm in enumerate(norms):
        history.append(step, norm, max_norm, min(1.0, max_norm / norm))
    return history


def test_a_record_says_what_was_done() -> None:
    history = History()
    history.append(7, total_norm=0.5, max_norm=1.0, clip_coef=1.0)
    history.append(8, total_norm=4.0, max_norm=1.0, clip_coef=0.25)
    history.append(9, total_norm=INF, max_norm=1.0, clip_coef=0.0)
    history.append(10, total_norm=NAN, max_norm=1.0, clip_coef=NAN)
    history.append(11, total_norm=INF, max_norm=1.0, clip_coef=0.0, skipped=True)
    assert history[0] == Record(
        7, 0.5, 1.0, 1.0, clipped=False, nonfinite=False, skipped=False, clipped_norm=0.5
    )
    assert history[1] == Record(8, 4.0, 1.0, 0.25, True, False, False, clipped_norm=1.0)
    assert history[2][:7] == (9, INF, 1.0, 0.0, True, True, False)
    assert (history[3].clipped, history[3].nonfinite) == (False, True)
    assert history[4] == Record(11, INF, 1.0, 0.0, False, True, skipped=True, clipped_norm=0.0)
    assert [math.isnan(record.clipped_norm) for record in history] == [False, False, True, True, False]


def test_the_norm_after_clipping_is_what_the_caller_says_or_that_of_a_single_threshold() -> None:
    history = History()
    history.append(0, total_norm=5.0, max_norm=1.0, clip_coef=0.2)
    history.append(1, total_norm=5.0, max_norm=1.0, clip_coef=0.2, clipped_norm=3.0)  # of two sets
    history.append(2, 5.0, 1.0, torch.tensor(0.5), clipped_norm=torch.tensor(4.0, dtype=torch.float64))
    history.append(3, 5.0, 1.0, 1.0, skipped=torch.tensor(True), clipped_norm=torch.tensor(5.0))
    expected = [1.0, 3.0, 4.0, 0.0]
    assert [record.clipped_norm for record in history] == expected
    assert [record.clipped_norm for record in duplicate_by_state(history)] == expected


def test_it_is_a_sequence() -> None:
    history = history_of([1.0, 2.0, 3.0])
    assert len(history) == 3
    assert [r.step for r in history] == [0, 1, 2]
    assert history[-1].step == 2
    assert [r.step for r in history[1:]] == [1, 2]
    assert [r.step for r in reversed(history)] == [2, 1, 0]
    assert history[1] in history
    assert not History()
    assert repr(history) == "<History of 3 steps, at most 10,000>"


def test_the_record_is_bounded_and_the_counts_are_not() -> None:
    history = history_of([5.0] + [0.5] * 3000 + [2.0], maxlen=10)
    assert [r.step for r in history] == list(range(2992, 3002))
    summary = history.summary()
    assert (summary.steps, summary.clipped, summary.kept) == (3002, 2, 10)
    assert (summary.largest_norm, summary.largest_step) == (5.0, 0)
    assert summary.quantiles[0.5] == 0.5
    assert "(last 10 steps); largest 5 at step 0" in str(summary)


# --- tensors are read late, and together --------------------------------------------------------------------


def test_appending_runs_no_operation_and_reading_runs_one_transfer() -> None:
    norms = [torch.tensor(float(n)) for n in range(1, 101)]
    coefficients = [torch.tensor(1.0 / n) for n in range(1, 101)]
    history = History()
    with Operations() as operations:
        for step in range(100):
            history.append(step, norms[step], 1.0, coefficients[step])
        assert operations.names == []
        last = history[-1]
        assert operations.names == ["stack"]
        assert [r.step for r in history] == list(range(100))
        history.summary()
        assert operations.names == ["stack"]
    assert last[:7] == (99, 100.0, 1.0, coefficients[99].item(), True, False, False)
    assert last.clipped_norm == pytest.approx(1.0)


def test_tensors_of_several_dtypes_become_python_numbers() -> None:
    history = History()
    history.append(
        0,
        torch.tensor(1e300, dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float32),
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.tensor(False),
    )
    history.append(1, 3.0, 1.0, 1.0, torch.tensor(True))
    assert history[0][:7] == (0, 1e300, torch.tensor(0.1).item(), 0.5, True, False, False)
    types = [int, float, float, float, bool, bool, bool, type(None), float]
    assert [type(value) for value in history[0]] == types
    assert history[1] == Record(1, 3.0, math.inf, 1.0, False, False, True, clipped_norm=0.0)


def test_tensors_do_not_pile_up_without_bound() -> None:
    history, most = History(), 0
    with Operations() as operations:
        for step in range(5000):
            history.append(step, torch.ones(()), 1.0, 1.0)
            most = max(most, step + 1 - 1024 * operations.names.count("stack"))
    assert most <= 1024
    assert len(history) == 5000


# --- summary ------------------------------------------------------------------------------------------------


def test_summary_counts_and_quantiles() -> None:
    history = History()
    norms = [0.5, 2.0, INF, NAN, 8.0, 8.0]
    for step, norm in enumerate(norms):
        history.append(step, norm, 1.0, min(1.0, 1.0 / norm), skipped=not math.isfinite(norm))
    summary = history.summary()
    assert (summary.steps, summary.clipped, summary.nonfinite, summary.skipped) == (6, 3, 2, 2)
    assert summary.clipped_share == 0.5
    assert (summary.largest_norm, summary.largest_step) == (8.0, 4)
    finite = [0.5, 2.0, 8.0, 8.0]
    assert summary.quantiles == {q: np.quantile(finite, q) for q in (0.1, 0.5, 0.9, 0.99)}
    assert str(summary) == (
        "6 steps: 3 clipped (50.0%), 2 non-finite, 2 skipped\n"
        "norm: 10% 0.95, 50% 5, 90% 8, 99% 8; largest 8 at step 4\n"
        "after clipping: 10% 0, 50% 0.75, 90% 1, 99% 1"
    )
    assert "after clipping" not in str(history_of([0.5, 0.25]).summary())


@pytest.mark.parametrize("maxlen", [1, 100])
def test_records_of_the_same_step_count_as_one(maxlen: int) -> None:
    history, resumed = History(maxlen), History(maxlen)
    for step, norm in [(0, 0.5), (0, 4.0), (0, 4.0), (1, 0.5), (1, INF), (2, 8.0), (2, 0.5)]:
        for each in (history, resumed):
            each.append(step, norm, 1.0, min(1.0, 1 / norm), skipped=norm == INF)
        state, resumed = resumed.state_dict(), History(maxlen)
        resumed.load_state_dict(state)
    summary = history.summary()
    assert (summary.steps, summary.clipped, summary.nonfinite, summary.skipped) == (3, 2, 1, 1)
    assert summary.clipped_share == pytest.approx(2 / 3)
    assert summary.kept == min(maxlen, 3)
    assert len(history) == min(maxlen, 7)
    if maxlen > 1:
        assert resumed.summary() == summary
        assert str(summary).startswith("3 steps: 2 clipped (66.7%)")
        assert "last" not in str(summary)


@pytest.mark.parametrize("norms", [[], [NAN, INF]])
def test_summary_without_a_finite_norm(norms: list[float]) -> None:
    summary = history_of(norms).summary()
    assert summary.steps == summary.nonfinite == len(norms)
    assert math.isnan(summary.largest_norm)
    assert summary.largest_step is None
    assert summary.quantiles == {}
    assert "none finite" in str(summary)


# --- files and pictures -------------------------------------------------------------------------------------


def test_columns_and_csv_have_every_field_in_full_precision(tmp_path: Path) -> None:
    path, history = tmp_path / "history.csv", history_of([1 / 3, 1e-300, INF])
    history.append(3, 4.0, 1.0, 0.25, loss=2.5, clipped_norm=3.0)
    columns = history.as_dict()
    assert tuple(columns) == (*RECORDED, "loss", "clipped_norm")
    assert list(zip(*columns.values(), strict=True)) == [*history]
    history.to_csv(path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == tuple(columns)
    for name, column in columns.items():
        assert [row[name] for row in rows] == ["" if value is None else str(value) for value in column]
    assert History().as_dict() == {name: [] for name in columns}


def test_plot_shows_norms_threshold_and_marks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "history.png"
    history = history_of([0.5, 4.0, INF, 0.1, 3.0])
    history.append(5, NAN, 1.0, NAN, skipped=True)
    figure = history.plot(path)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    lines: dict[Any, Any] = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["norm"].get_ydata(), [0.5, 4.0, NAN, 0.1, 3.0, NAN])
    np.testing.assert_array_equal(lines["threshold"].get_ydata(), [1.0] * 6)
    assert lines["clipped (3)"].get_xdata().tolist() == [1, 2, 4]
    assert lines["non-finite (2)"].get_xdata().tolist() == [2, 5]
    assert lines["skipped (1)"].get_xdata().tolist() == [5]
    from matplotlib.image import imread

    assert imread(path).std() > 0.05


@pytest.mark.parametrize("norms", [[], [NAN], [0.0], [INF, 0.0]])
def test_plot_of_a_run_with_nothing_to_draw(norms: list[float], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History()
    for step, norm in enumerate(norms):
        history.append(step, norm, INF, 1.0)
    history.plot(tmp_path / "history.png")


# --- resuming -----------------------------------------------------------------------------------------------


def test_a_record_with_the_norms_of_single_parameters_is_like_one_without() -> None:
    history = history_of([2.0])
    assert history[0].layers is None
    norms = torch.tensor([2.0, -1.0, NAN], dtype=torch.float64)
    for sampled in (
        with_layers(history[0], ["a", "b", "c"], norms),
        with_layers(history[0], "abc", [2, -1, NAN]),
    ):
        for record in (sampled, pickle.loads(pickle.dumps(sampled))):
            assert record.layers == {"a": 2.0, "b": 0.0, "c": pytest.approx(NAN, nan_ok=True)}
            assert record == history[0]


def duplicate_by_state(history: History) -> History:
    other = History(maxlen=50)
    other.append(0, 1e9, 1.0, 1.0)  # is replaced
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    return other


def test_the_loss_of_a_step_is_kept_and_saved() -> None:
    history = History()
    history.append(0, 1.0, INF, 1.0, loss=3.5)
    history.append(1, 1.0, INF, 1.0, False, torch.tensor(2.5))
    history.append(2, 1.0, INF, 1.0)
    history.append(3, 1.0, INF, 1.0, loss=torch.tensor(2, dtype=torch.int64))
    assert [record.loss for record in history] == [3.5, 2.5, None, 2.0]
    for other in (duplicate_by_state(history), pickle.loads(pickle.dumps(history))):
        assert list(other) == list(history)


def test_numbers_of_other_types_in_a_state_become_those_of_a_record() -> None:
    state = history_of([1.0, 2.0]).state_dict()
    state["records"]["total_norm"] = (1, np.float32(2.0))
    state["records"]["clipped"] = [0, 1]
    state["records"]["loss"] = [np.float64(0.5), 3]
    history = History()
    history.load_state_dict(state)
    assert [type(value) for value in history[1]] == [int, float, float, float, bool, bool, bool, float, float]
    assert [record.loss for record in history] == [0.5, 3.0]


@pytest.mark.parametrize(
    "duplicate", [duplicate_by_state, copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))]
)
def test_a_resumed_history_goes_on_as_if_not_interrupted(duplicate: Callable[[History], History]) -> None:
    norms = np.random.default_rng(0).lognormal(size=100).tolist()
    uninterrupted = history_of(norms, maxlen=50)
    first = history_of(norms[:70], maxlen=50)
    first.append(70, torch.tensor(norms[70], dtype=torch.float64), 1.0, min(1.0, 1 / norms[70]))
    second = duplicate(first)
    for step in range(71, 100):
        second.append(step, norms[step], 1.0, min(1.0, 1 / norms[step]))
    assert list(second) == list(uninterrupted)
    assert second.summary() == uninterrupted.summary()
    assert len(first) == 50
    assert first[-1].step == 70


def test_a_shorter_history_keeps_the_last_steps_of_a_state() -> None:
    history = History(maxlen=3)
    history.load_state_dict(history_of([9.0] + [0.5] * 9).state_dict())
    assert [r.step for r in history] == [7, 8, 9]
    assert history.summary().steps == 10
    assert history.summary().largest_norm == 9.0


COUNTS = history_of([1.0, 2.0]).state_dict()["counts"]
COLUMNS = history_of([1.0, 2.0]).as_dict()
LAYERS = {**Layers().state_dict(), "names": ["a"], "steps": [0, 1], "norms": [[1.0], [2.0]]}


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ({"records": [1.0]}, TypeError, r"`state\['records'\]` must be a dictionary"),
        ({"records": {}}, ValueError, r"`state\['records'\]` lacks 'step', .*History\.state_dict"),
        ({"records": {**COLUMNS, "step": 3}}, TypeError, r"`state\['records'\]\['step'\]` must be a list"),
        ({"records": {**COLUMNS, "step": [0, 1.5]}}, TypeError, r"\['step'\]` must be an integer, got 1\.5"),
        ({"records": {**COLUMNS, "max_norm": [1.0, "1"]}}, TypeError, r"\['max_norm'\]` must be a number"),
        ({"records": {**COLUMNS, "clipped": [True, None]}}, TypeError, r"\['clipped'\]` must be True or"),
        ({"records": {**COLUMNS, "loss": ["1", None]}}, TypeError, r"\['loss'\]` must be a number"),
        ({"records": {**COLUMNS, "clipped": [True]}}, ValueError, r"`state\['records'\]` .*same length"),
        ({"counts": {}}, ValueError, r"`state\['counts'\]` lacks 'steps'"),
        ({"counts": {**COUNTS, "steps": -1}}, ValueError, r"`state\['counts'\]\['steps'\]` must be at least"),
        ({"counts": {**COUNTS, "largest_norm": "2"}}, TypeError, r"\['largest_norm'\]` must be a number"),
        ({"counts": {**COUNTS, "largest_step": 1.5}}, TypeError, r"\['largest_step'\]` must be an integer"),
        ({"layers": None}, TypeError, r"`state\['layers'\]` must be a dictionary"),
        ({"layers": {}}, ValueError, r"`state\['layers'\]` lacks 'names', 'steps', 'norms', 'weights',"),
        (
            {"layers": {**LAYERS, "names": [1]}},
            TypeError,
            r"\['layers'\]\['names'\]` must hold strings",
        ),
        (
            {"layers": {**LAYERS, "steps": [0, 0.5]}},
            TypeError,
            r"\['layers'\]\['steps'\]` must be an integer",
        ),
        ({"layers": {**LAYERS, "norms": [1.0, 2.0]}}, TypeError, r"\['layers'\]\['norms'\]` must be a list"),
        ({"layers": {**LAYERS, "norms": [[1.0], ["x"]]}}, TypeError, r"must be a number, got 'x'"),
        ({"layers": {**LAYERS, "norms": [[1.0]]}}, ValueError, r"a row for each of the steps"),
        ({"layers": {**LAYERS, "norms": [[1.0] * 3] * 2}}, ValueError, r"a row for each of the steps"),
        ({"layers": {**LAYERS, "updates": [[1.0]] * 2}}, TypeError, r"\['weights'\]` must be a list"),
        (
            {"layers": {**LAYERS, "every": 0}},
            ValueError,
            r"`state\['layers'\]\['every'\]` must be at least 1",
        ),
    ],
)
def test_the_wrong_state_is_refused_and_changes_nothing(
    part: dict[str, Any], error: type[Exception], message: str
) -> None:
    history = history_of([1.0, 2.0])
    history.layers.append(0, ["a"], [1.0])
    before = history.state_dict()
    with pytest.raises(error, match=message):
        history.load_state_dict({**before, **part})
    with pytest.raises(ValueError, match="`state` lacks 'records', 'counts', 'layers'; pass what History"):
        history.load_state_dict({"step": 3})
    assert history.state_dict() == before


@pytest.mark.parametrize(
    ("maxlen", "error", "message"),
    [(0, ValueError, "`maxlen` must be at least 1, got 0"), (1.5, TypeError, "`maxlen` must be an integer")],
)
def test_bad_bounds_are_named(maxlen: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        History(maxlen)


# --- an empty history, and reading from another thread ------------------------------------------------------


def test_an_empty_history_is_an_empty_sequence_with_words() -> None:
    history = History()
    for index in (0, -1):
        with pytest.raises(IndexError, match="the history is empty: no step has been recorded yet"):
            history[index]
    assert history[:] == []
    assert list(reversed(history)) == []
    assert history_of([1.0])[0] not in history


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_that_is_not_there_is_named(index: int) -> None:
    with pytest.raises(IndexError, match=f"no record {index}: it keeps 3, from 0 to 2"):
        history_of([1.0, 2.0, 3.0])[index]


READS: dict[str, Callable[[History], Sequence[int]]] = {
    "list": lambda history: [record.step for record in history],
    "reversed": lambda history: [record.step for record in reversed(history)][::-1],
    "slice": lambda history: [record.step for record in history[:]],
    "columns": lambda history: history.as_dict()["step"],
    "state": lambda history: history.state_dict()["records"]["step"],
}


@pytest.mark.parametrize("maxlen", [50, 100_000])
@pytest.mark.parametrize("read", READS)
def test_another_thread_reads_the_history_at_one_moment(read: str, maxlen: int) -> None:
    history = History(maxlen)
    with readers(lambda: list(READS[read](history))) as found:
        for step in range(3000):
            history.append(step, 1.0, 1.0, 1.0)
            if step % 100 == 0:
                history.summary()
    for steps in found:
        assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
    assert [record.step for record in history] == list(range(3000))[-maxlen:]
    assert history.summary().steps == 3000


def test_counts_fit_the_records_read_with_them() -> None:
    history = History()

    def counted() -> tuple[int, int, int]:
        state = history.state_dict()
        return len(state["records"]["step"]), state["counts"]["steps"], state["counts"]["clipped"]

    with readers(counted) as found:
        for step in range(2000):
            history.append(step, 2.0, 1.0, 0.5)
    assert all(records == steps == clipped for records, steps, clipped in found)


def test_a_reader_that_fails_loses_nothing() -> None:
    history = History()
    history.append(0, 1.0, 1.0, 1.0)
    history.append(1, torch.ones((), device="meta"), 1.0, 1.0)  # its value cannot be read
    with pytest.raises(NotImplementedError):
        history.summary()
    history._pending[1] = (1, 2.0, 1.0, 0.5, False, None, None, None)
    assert [record.total_norm for record in history] == [1.0, 2.0]


def test_a_signal_handler_may_read_in_the_middle_of_a_read() -> None:
    history = history_of([1.0, 2.0])
    nested: list[int] = []

    class ReadsOnce(float):
        def __lt__(self, other: float) -> bool:
            if not nested:
                nested.append(0)
                nested[0] = len(history)
            return super().__lt__(other)

    history.append(2, 1.0, 1.0, ReadsOnce(0.5))
    reader = threading.Thread(target=history.summary, daemon=True)
    reader.start()
    reader.join(timeout=10)
    assert not reader.is_alive(), "it waits for itself"
    assert nested == [3]
    assert [record.step for record in history] == [0, 1, 2]
    assert history.summary().steps == 3
