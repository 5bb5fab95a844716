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
from torchclip.ranks_report.fingerprints import Fingerprint
from torchclip.ranks_report.judgment import connections, parameters_of
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


def recommended(weights: Mapping[str, Sequence[int]], groups: dict[str, list[list[int]]]) -> list[str]:
    """What to do if eight ranks have these weights of parameters, 0 where one is missing."""
    fingerprints = {weight: Fingerprint((1,), float(weight), (float(weight),) * 4) for weight in range(9)}
    facts = [
        Facts(
            {
                name: Held("", (), fingerprints[of[rank]], fingerprints[1])
                for name, of in weights.items()
                if of[rank]
            },
            [(name, tuple(ranks)) for name, each in groups.items() for ranks in each if rank in ranks],
            [],
        )
        for rank in range(8)
    ]
    code = InCode("model.parameters()", "model.named_parameters()")
    return advice(parameters_of(facts), facts, code, connections([], 8)).lines


def test_sets_of_parameters_that_need_different_groups() -> None:
    groups = {
        "default_pg": [[*range(8)]],
        "mesh_tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "undefined": [[0, 1, 2, 3], [4, 5, 6, 7], [0, 2, 4, 6], [1, 3, 5, 7]],
    }
    weights = {"norm": [1] * 8, "linear": [1, 2] * 4, "up": [1, 2, 3, 4] * 2, "a": [1, 1, 2, 2, 3, 3, 4, 4]}
    assert recommended(weights, groups) == [
        "grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}",
        "part0 = [grad for name, grad in grads.items() if name in ['norm']]",
        "part1 = [grad for name, grad in grads.items() if name in ['linear']]",
        "part2 = [grad for name, grad in grads.items() if name in ['up']]",
        "part3 = [grad for name, grad in grads.items() if name in ['a']]",
        "norm0 = torchclip.get_total_norm(part0)",
        'norm1 = torchclip.get_total_norm(part1, group=mesh["tp"].get_group())',
        "norm2 = torchclip.get_total_norm(part2, group=group)",
        "norm3 = torchclip.get_total_norm(part3, group=group1)",
        "total_norm = torchclip.get_total_norm([norm0, norm1, norm2, norm3])",
        "torchclip.clip_grads_with_norm_(model.parameters(), 1.0, total_norm)",
    ]
    stages = {"first": [1] * 4 + [0] * 4, "last": [0] * 4 + [1] * 4, **weights}
    assert recommended(stages, groups)[0].startswith("# No process group that exists is right")
