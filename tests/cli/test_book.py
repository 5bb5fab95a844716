"""The book's chapter: every array that the text prints, by NumPy and by torch, and the command."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from torchclip.cli.book import command as book_command
from torchclip.cli.book import experiments as book
from torchclip.cli.book import figure
from torchclip.cli.main import main

# Printed by the text, rounded there to two decimals.

TANH = """
-1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.
-1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.   -1.   -0.99 -0.99 -0.99
-0.99 -0.99 -0.98 -0.98 -0.98 -0.97 -0.96 -0.96 -0.95 -0.94 -0.92 -0.91
-0.89 -0.86 -0.83 -0.8  -0.76 -0.72 -0.66 -0.6  -0.54 -0.46 -0.38 -0.29
-0.2  -0.1  -0.    0.1   0.2   0.29  0.38  0.46  0.54  0.6   0.66  0.72
 0.76  0.8   0.83  0.86  0.89  0.91  0.92  0.94  0.95  0.96  0.96  0.97
 0.98  0.98  0.98  0.99  0.99  0.99  0.99  0.99  1.    1.    1.    1.
 1.    1.    1.    1.    1.    1.    1.    1.    1.    1.    1.    1.
 1.    1.    1.    1.
"""

TANH_DERIVATIVE = """
0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.
0.   0.   0.   0.01 0.01 0.01 0.01 0.01 0.01 0.02 0.02 0.03 0.03 0.04
0.05 0.06 0.07 0.09 0.1  0.13 0.15 0.18 0.22 0.26 0.31 0.36 0.42 0.49
0.56 0.63 0.71 0.79 0.86 0.92 0.96 0.99 1.   0.99 0.96 0.92 0.86 0.79
0.71 0.63 0.56 0.49 0.42 0.36 0.31 0.26 0.22 0.18 0.15 0.13 0.1  0.09
0.07 0.06 0.05 0.04 0.03 0.03 0.02 0.02 0.01 0.01 0.01 0.01 0.01 0.01
0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.   0.
0.   0.
"""

WEIGHTS = {
    1.0: "1.79 0.44 0.1  -1.86 -0.28 -0.35  -0.08 -0.63 -0.04",
    0.5: "0.89 0.22 0.05  -0.93 -0.14 -0.18  -0.04 -0.31 -0.02",
}

NORMS = {
    1.0: """
        2.47   3.34   4.78   6.28   8.08  10.25  12.94  16.28  20.45  25.69
       32.25  40.49  50.82  63.8   80.08 100.51 126.16 158.36 198.77 249.5
    """,
    0.5: """
        1.23 0.83 0.6  0.39 0.25 0.16 0.1  0.06 0.04 0.03 0.02 0.01 0.01 0.
        0.   0.   0.   0.   0.   0.
    """,
}

TWO_GRADIENTS = """
6.49 2.78 6.76   5.91 0.24 5.59   2.59 4.15 2.84
6.93 4.4  1.57   5.45 7.8  3.06   2.22 3.88 9.36
"""

TWO_CLIPPED = """
1.5  0.64 1.56   1.36 0.06 1.29   0.6  0.96 0.65
1.6  1.01 0.36   1.25 1.8  0.71   0.51 0.89 2.16
"""

THREE_GRADIENTS = """
9.76 6.72 9.03   8.46 3.78 0.92   6.53 5.58 3.62
2.25 4.07 4.69   2.69 2.92 4.58   8.61 5.86 2.83
2.78 4.55 2.05   2.01 5.14 0.87   4.84 3.62 7.08
"""

THREE_CLIPPED = """
1.79 1.23 1.66   1.55 0.69 0.17   1.2  1.02 0.66
0.41 0.75 0.86   0.49 0.54 0.84   1.58 1.08 0.52
0.51 0.83 0.38   0.37 0.94 0.16   0.89 0.66 1.3
"""

FIGURES = ["clipped.png", "exploding.png", "tanh.png", "vanishing.png"]

tanh_curves = pytest.mark.parametrize("tanh_curve", [book.tanh_curve, book.tanh_curve_torch])
norms = pytest.mark.parametrize("gradient_norms", [book.gradient_norms, book.gradient_norms_torch])
examples = pytest.mark.parametrize("worked_example", [book.worked_example, book.worked_example_torch])


def assert_prints(values: Any, printed: str) -> None:
    """The values, in order and rounded to two decimals, are the printed ones."""
    flat = np.round(np.ravel(values), 2)
    np.testing.assert_array_equal(flat, [float(number) for number in printed.split()])


@tanh_curves
def test_tanh_and_its_derivative(tanh_curve: Callable[..., Any]) -> None:
    h, y, dy = tanh_curve()
    np.testing.assert_allclose(h, np.arange(-50, 50) / 10, atol=1e-12)
    assert_prints(y, TANH)
    assert_prints(dy, TANH_DERIVATIVE)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_recurrent_weights(scale: float) -> None:
    assert_prints(book.recurrent_weights(scale), WEIGHTS[scale])


@norms
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_gradient_explodes_or_vanishes_with_the_scale_of_the_weights(
    gradient_norms: Callable[..., Any], scale: float
) -> None:
    assert_prints(gradient_norms(scale), NORMS[scale])


@norms
def test_clipping_at_each_step_keeps_the_exploding_gradient_at_the_threshold(
    gradient_norms: Callable[..., Any],
) -> None:
    clipped = gradient_norms(1.0, max_norm=5.0)
    assert clipped[0] == gradient_norms(1.0)[0] < 2.5
    np.testing.assert_allclose(clipped[1:], 2.5, rtol=1e-6)


@norms
def test_clipping_does_nothing_to_the_vanishing_gradient(gradient_norms: Callable[..., Any]) -> None:
    np.testing.assert_array_equal(gradient_norms(0.5, max_norm=5.0), gradient_norms(0.5))


def test_large_gradients_continue_the_stream_of_the_weights() -> None:
    two, three = book.large_gradients()
    assert_prints(two, TWO_GRADIENTS)
    assert_prints(three, THREE_GRADIENTS)


@examples
def test_two_gradients(worked_example: Callable[..., Any]) -> None:
    two, _ = book.large_gradients()
    example = worked_example(two)
    assert_prints([example.norm, example.rate, example.clipped_norm], "21.71 0.23 5.0")
    assert_prints(example.clipped, TWO_CLIPPED)


@examples
def test_three_gradients(worked_example: Callable[..., Any]) -> None:
    _, three = book.large_gradients()
    example = worked_example(three)
    assert_prints(example.clipped_norm, "5.0")
    assert_prints(example.clipped, THREE_CLIPPED)


@examples
def test_the_example_clips_copies(worked_example: Callable[..., Any]) -> None:
    two, _ = book.large_gradients()
    worked_example(two)
    assert_prints(two, TWO_GRADIENTS)


def chunks(printed: str, size: int) -> list[str]:
    """The printed numbers as the lesson shows them, ``size`` to a line."""
    numbers = [f"{float(number) + 0.0:.2f}" for number in printed.split()]
    return [" ".join(numbers[i : i + size]) for i in range(0, len(numbers), size)]


def assert_lesson(lesson: str) -> None:
    """Every array of the text is in the lesson, NumPy's and torch's."""
    lines = lesson.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lesson.split())
    for series in (TANH, TANH_DERIVATIVE, *NORMS.values()):
        for chunk in chunks(series, 10):
            assert f"NumPy {chunk} " in words
            assert f"torch {chunk} " in words
    for matrices in (TWO_GRADIENTS, TWO_CLIPPED, THREE_GRADIENTS, THREE_CLIPPED):
        for row in chunks(matrices, 3):
            assert f"{row} {row} " in words
    for weights in WEIGHTS.values():
        assert " ".join(chunks(weights, 3)) in words
    for row in ("norm 21.71 21.71", "rate 0.23 0.23", "norm, clipped 5.00 5.00"):
        assert row in words


def assert_figures(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == FIGURES
    for name in FIGURES:
        pixels = imread(directory / name)
        assert pixels.shape[:2] == (600, 960)
        assert len(np.unique((255 * pixels).astype(np.uint8).view(np.uint32))) > 50  # colours


def test_the_lesson_shows_numpy_and_torch_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    book_command.run(figures=None)
    assert_lesson(capsys.readouterr().out)


@pytest.mark.slow
def test_figures_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "tanh.png").write_bytes(b"old")
    book_command.run(tmp_path)
    assert_figures(tmp_path)


def test_a_directory_that_cannot_be_made_is_refused_before_the_lesson(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        book_command.run(tmp_path / "file")
    assert capsys.readouterr().out == ""


def test_command(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there"
    command = [sys.executable, "-m", "torchclip", "book", "--figures", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lesson, paths = done.stdout.split("Figures:")
    assert_lesson(lesson)
    assert sorted(map(str.strip, paths.strip().splitlines())) == [str(directory / name) for name in FIGURES]
    assert_figures(directory)


@pytest.mark.slow
def test_command_refuses_a_file_in_the_directory_s_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    command = [sys.executable, "-m", "torchclip", "book", "--figures", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr


def test_a_section_is_a_page_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lesson, pages = "", []
    for number in range(1, 6):
        main(["book", "--section", str(number)])
        pages.append(capsys.readouterr().out)
        assert len(pages[-1].splitlines()) <= 65
    main(["book"])
    lesson = capsys.readouterr().out
    assert "".join(pages) == lesson
    assert_lesson(lesson)


def test_a_section_draws_its_own_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["book", "--section", "2", "--plot", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exploding.png", "vanishing.png"]
    main(["book", "--section", "4", "--plot", str(tmp_path)])
    assert "This section has no figures." in capsys.readouterr().out


@pytest.mark.parametrize("section", ["0", "6", "x"])
def test_sections_that_are_not_there(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["book", "--section", section])
    assert "argument --section" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "60"])
def test_the_lesson_fits_a_narrow_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(["book"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert all(line == line.rstrip() for line in lines)
    # Numbers stay in line: no row of five breaks.
    assert any(re.search(r"( +-1\.00){5}$", line) for line in lines)
    assert not any("…" in line for line in lines)


def test_the_exploding_gradient_is_a_straight_line_on_the_log_scale() -> None:
    linear, log = figure.gradient_norms_figure(book.gradient_norms(1.0), "title").axes
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    for axes in (linear, log):
        (line,) = axes.get_lines()
        np.testing.assert_array_equal(line.get_ydata(), book.gradient_norms(1.0))
