"""A short run of ``stress.py``, and tests that it finds faults."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import stress
import torch
from torch import Tensor

import torchclip
from torchclip import clip_grad_norm_

pytestmark = pytest.mark.filterwarnings("ignore:Sparse ")


@pytest.mark.parametrize("seed", range(10))
def test_random_calls_agree_with_the_twins(seed: int) -> None:
    with stress.mesh_of_one() as mesh:
        for case in range(60):
            try:
                stress.run_case(seed, case, mesh)
            except Exception as error:
                raise AssertionError(
                    f"repeat it: python tests/stress/stress.py --seed {seed} --first {case} --cases 1"
                ) from error


def one_part_in_ten_thousand_off(parameters: Any, max_norm: float, *arguments: Any) -> Tensor:
    return clip_grad_norm_(parameters, max_norm * 1.0001, *arguments)


def without_a_trace(parameters: Any, *arguments: Any) -> Tensor:
    return torch.tensor(math.nan)


@pytest.mark.parametrize("wrong", [one_part_in_ten_thousand_off, without_a_trace])
def test_the_first_wrong_case_is_printed_with_how_to_repeat_it(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchclip, "clip_grad_norm_", wrong)
    assert stress.main(["--seed", "1", "--cases", "100"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("repeat it: python ")
    again = last.split("--seed ")[1].split()
    assert again[1::2] == ["--first", "--cases"]
    assert stress.main(["--seed", *again]) == 1


def test_the_time_is_limited(capsys: pytest.CaptureFixture[str]) -> None:
    assert stress.main(["--seconds", "0"]) == 0
    assert "0 cases of seed 0 right" in capsys.readouterr().out
