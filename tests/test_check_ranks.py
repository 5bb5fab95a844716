"""check_ranks(): on one process here, and on several in ``ranks_report_checks.py``."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import ranks_report_checks
import torch
from distributed_helpers import Check, Ranks, checks_of
from torch import nn

import torchclip
from torchclip.ranks_report.facts import Facts, Held
from torchclip.ranks_report.judgment import parameters_of, passed
from torchclip.ranks_report.recommendation import InCode, advice


@pytest.mark.parametrize("check", checks_of(ranks_report_checks))
def test_check_on_ranks(ranks: Ranks, check: Check) -> None:
    ranks.run(check, with_kernel=True)


def test_one_process() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(3, 2)).sum().backward()
    report = torchclip.check_ranks(model)
    assert report.ok
    assert report.call == "nothing to do"
    assert report.norms == [report.norm]
    assert report.norm == pytest.approx(27**0.5)
    assert str(report).startswith("one process: nothing to compare.")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("model", TypeError, "`parameters` must be a tensor or an iterable of tensors"),
        ([], None, ""),
        ([1.0], TypeError, "`parameters` must hold tensors only, item 0 is 1.0"),
        (nn.Linear(2, 2).named_parameters(), TypeError, r"pass `.parameters\(\)`"),
        (nn.Linear(2, 2, device="meta"), ValueError, "parameter 'weight' is on the device 'meta'"),
    ],
)
def test_bad_input(given: Any, error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert torchclip.check_ranks(given).norm == 0
        return
    with pytest.raises(error, match=message):
        torchclip.check_ranks(given)


def test_a_group_that_is_none() -> None:
    with pytest.raises(TypeError, match="`group` must be a process group"):
        torchclip.check_ranks([], group="ep")  # type: ignore[arg-type]
    group: Any = "ep"
    with pytest.raises(TypeError, match="`group` must be a process group"):
        torchclip.install(group)
    with pytest.raises(TypeError, match="`group` must be a process group"), torchclip.installed(group):
        pass


def lying(weights: Mapping[str, Sequence[int]], groups: dict[str, list[list[int]]]) -> list[Facts]:
    """What eight ranks have: for each parameter its weights on them, 0 where it is missing."""
    return [
        Facts(
            {name: Held("", (), of[rank], 1.0, (1.0,)) for name, of in weights.items() if of[rank]},
            [(name, tuple(ranks)) for name, each in groups.items() for ranks in each if rank in ranks],
            [],
        )
        for rank in range(8)
    ]


def recommended(facts: list[Facts]) -> list[str]:
    code = InCode("model.parameters()", "model.named_parameters()")
    return advice(parameters_of(facts), facts, code, passed(facts)).lines


def test_groups_that_cross() -> None:
    """Stages, each with experts and replicas: no one group connects the experts of all stages."""
    groups = {
        "default_pg": [[*range(8)]],
        "mesh_pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "mesh_dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "mesh_ep": [[0, 1], [2, 3], [4, 5], [6, 7]],
    }
    stages = {"first": [1] * 4 + [0] * 4, "last": [0] * 4 + [1] * 4}
    pp, ep = ('mesh["pp"].get_group()', 'mesh["ep"].get_group()')
    experts = {"first.expert": [1, 2, 1, 2, 0, 0, 0, 0], "last.expert": [0, 0, 0, 0, 3, 4, 3, 4]}
    assert recommended(lying(stages, groups)) == [
        f"torchclip.clip_grad_norm_(model.parameters(), 1.0, group={pp})"
    ]
    assert recommended(lying(experts, groups)) == [
        f"torchclip.clip_grad_norm_(model.parameters(), 1.0, group=[{pp}, {ep}])"
    ]
    assert recommended(lying({**stages, **experts}, groups))[1:] == [
        "part0 = [grad for name, grad in grads.items() if name in ['first', 'last']]",
        "part1 = [grad for name, grad in grads.items() if name in ['first.expert', 'last.expert']]",
        f"norm0 = torchclip.get_total_norm(part0, group={pp})",
        f"norm1 = torchclip.get_total_norm(part1, group=[{pp}, {ep}])",
        "total_norm = torchclip.get_total_norm([norm0, norm1])",
        "torchclip.clip_grads_with_norm_(model.parameters(), 1.0, total_norm)",
    ]


def test_groups_without_names_are_told_apart() -> None:
    groups = {"undefined": [[0, 1], [2, 3], [4, 5], [6, 7], [0, 2, 4, 6], [1, 3, 5, 7]]}
    weights = {"a": [1, 2] * 4, "b": [1, 1, 2, 2, 3, 3, 4, 4]}
    lines = recommended(lying(weights, groups))
    assert "norm0 = torchclip.get_total_norm(part0, group=group)" in lines
    assert "norm1 = torchclip.get_total_norm(part1, group=group1)" in lines
