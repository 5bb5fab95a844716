"""Checks of ``check_ranks`` and of ``install(group=...)`` that all ranks run together."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import since_2_7, world_of
from dtensors import addends, parameter, split
from helpers import grad_of, randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import torchclip
from torchclip.ranks_report import RanksReport

EP = 'mesh["ep"].get_group()'


def everyones(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def grads_of(checked: Any) -> list[Tensor]:
    parameters = checked.parameters() if isinstance(checked, nn.Module) else checked
    return [p.grad for p in parameters if p.grad is not None]


def report_on(checked: Any, group: Any = None) -> RanksReport:
    """The report, which is the same on all ranks, and says what the call really returns on each."""
    report = torchclip.check_ranks(checked, group=group)
    assert set(map(str, everyones(str(report).rpartition("\n")[0]))) == {str(report).rpartition("\n")[0]}
    assert everyones(report) == [report] * dist.get_world_size()
    real = everyones(float(torchclip.get_total_norm(grads_of(checked), group=group)))
    assert report.norms == pytest.approx(real, rel=1e-6)
    return report


def words_of(report: RanksReport) -> str:
    return " ".join(str(report).split())


def follow(report: RanksReport, **names: Any) -> None:
    """Run the code that the report recommends: it clips all gradients by the norm of the report."""
    checked = names["model"] if "model" in names else names["parameters"]
    before = [grad.clone() for grad in grads_of(checked)]
    exec(report.call, {"torchclip": torchclip, "torch": torch, "report": report, **names})
    assert report.norm > 1
    for old, new in zip(before, grads_of(checked), strict=True):
        torch.testing.assert_close(new, old / report.norm, rtol=1e-5, atol=1e-7)


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))


def local(seed: int, *shape: int) -> nn.Parameter:
    """A parameter with a gradient, both made from a seed."""
    p = nn.Parameter(randn(*shape, seed=seed))
    p.grad = randn(*shape, seed=seed + 100)
    return p


class Mixture(nn.Module):
    """A layer with replicas everywhere, and an expert."""

    def __init__(self, expert: int, dense: bool = True) -> None:
        super().__init__()
        if dense:
            self.dense = nn.ParameterDict({"weight": local(0, 5, 3), "bias": local(1, 5)})
        self.expert = nn.ParameterDict({"down": local(10 + expert, 3, 4), "up": local(20 + expert, 4, 3)})


def expert_on(mesh: DeviceMesh) -> int:
    return mesh.get_local_rank("ep")


def check_replicas_are_fine() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 1)))
    model(randn(4, 6, seed=dist.get_rank())).sum().backward()
    report = report_on(model)
    assert report.ok
    assert report.call == "nothing to do"
    assert (report.local, report.different, report.missing) == ([], [], {})
    assert report.norms == [pytest.approx(report.norm, rel=1e-6)] * 4
    assert "Replicas with the same gradient on all ranks" in words_of(report)
    assert str(report).endswith(" s.")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert torchclip.check_ranks(optimizer).norm == report.norm


def check_a_missing_all_reduce() -> None:
    model = Mixture(0)
    model.dense["weight"].grad = randn(5, 3, seed=dist.get_rank())
    report = report_on(model)
    assert not report.ok
    assert (report.local, report.different) == ([], ["dense.weight"])
    assert "dense.weight: The same weight, but DIFFERENT GRADIENTS on rank 0 | rank 1" in words_of(report)
    assert "all-reduce of their gradients is missing, or different parameters that start alike" in words_of(
        report
    )
    assert "report.different" in report.call


def check_experts_without_a_group() -> None:
    mesh = grid()
    model = Mixture(expert_on(mesh), dense=False)
    report = report_on(model)
    assert not report.ok
    assert report.local == ["expert.down", "expert.up"]
    assert report.call == f"torchclip.clip_grad_norm_(model.parameters(), 1.0, group={EP})"
    assert "ranks 0, 2 | ranks 1, 3" in words_of(report)
    assert f"{EP} connects ranks 0-1 | ranks 2-3." in words_of(report)
    assert "the ranks do not agree" in words_of(report)
    assert report.norm == pytest.approx(math.hypot(report.norms[0], report.norms[1]))
    right = report_on(model, group=mesh.get_group("ep"))
    assert right.ok
    assert right.call == "nothing to do"
    assert right.norms == [pytest.approx(report.norm, rel=1e-6)] * 4
    assert not report_on(model, group=dist.group.WORLD).ok
    assert not report_on(model, group=mesh.get_group("dp")).ok
    follow(report, model=model, mesh=mesh)


def check_experts_beside_replicas() -> None:
    """No one call is right: with a group the replicas count twice."""
    mesh = grid()
    model = Mixture(expert_on(mesh))
    report = report_on(model)
    assert report.local == ["expert.down", "expert.up"]
    assert not report_on(model, group=mesh.get_group("ep")).ok
    assert torchclip.check_ranks([model.dense["weight"], model.dense["bias"]]).ok
    assert torchclip.check_ranks([*model.expert.values()], group=mesh.get_group("ep")).ok
    follow(report, model=model, mesh=mesh)


def check_replicas_of_experts_need_an_all_reduce_too() -> None:
    mesh = grid()
    model = Mixture(expert_on(mesh), dense=False)
    model.expert["up"].grad = randn(4, 3, seed=dist.get_rank())
    report = report_on(model, group=mesh.get_group("ep"))
    assert not report.ok
    assert report.different == ["expert.up"]


def check_groups_by_their_names() -> None:
    pairs = [[0, 1], [2, 3]]
    model = Mixture(dist.get_rank() % 2, dense=False)
    report = report_on(model)
    assert report.call.startswith("# No process group that exists is right")
    assert "no process group that exists has each of these once on every rank" in words_of(report)
    dist.new_subgroups_by_enumeration(pairs)  # type: ignore[no-untyped-call]
    report = report_on(model)
    assert report.call == "torchclip.clip_grad_norm_(model.parameters(), 1.0, group=group)"
    assert "group connects ranks 0-1 | ranks 2-3." in words_of(report)
    described = [dist.new_group(ranks, group_desc="experts") for ranks in pairs]
    report = report_on(model)
    assert report.call == "torchclip.clip_grad_norm_(model.parameters(), 1.0, group=experts)"
    follow(report, model=model, experts=described[dist.get_rank() // 2])


def check_all_ranks_differ() -> None:
    parameters = [local(dist.get_rank(), 3)]
    report = report_on(parameters)
    assert report.local == ["[0]"]
    assert report.call == "torchclip.clip_grad_norm_(parameters, 1.0, group=torch.distributed.group.WORLD)"
    follow(report, parameters=parameters)


def check_stages_of_a_pipeline() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    model = nn.ParameterDict({f"layer{stage}": local(stage, 3), f"norm{stage}": local(9, 2)})
    report = report_on(model)
    assert not report.ok
    assert report.missing == {"layer0": (2, 3), "norm0": (2, 3), "layer1": (0, 1), "norm1": (0, 1)}
    assert report.local == [*report.missing]
    assert 'group=mesh["pp"].get_group()' in report.call
    assert "layer0, norm0: Missing on ranks 2-3" in words_of(report)
    assert report_on(model, group=mesh.get_group("pp")).ok
    follow(report, model=model, mesh=mesh)


def check_ranks_have_different_numbers_of_parameters() -> None:
    parameters = [local(i, 3) for i in range(dist.get_rank())]
    report = report_on(parameters)
    assert report.missing == {"[0]": (0,), "[1]": (0, 1), "[2]": (0, 1, 2)}
    assert report.norms[0] == 0
    assert report.norm == pytest.approx(report.norms[3])
    assert "no process group that exists has each of these once" in words_of(report)


def check_a_gradient_that_one_rank_lacks() -> None:
    model = Mixture(0)
    model.dense["bias"].requires_grad_(False).grad = None  # on all
    if dist.get_rank() == 2:
        model.expert["up"].grad = None
    report = report_on(model)
    assert report.different == ["expert.up"]
    assert "expert.up: The same weight, but NO GRADIENT on rank 2" in words_of(report)
    assert "dense.bias: No gradient on any rank." in words_of(report)
    if dist.get_rank() != 2:
        model.expert["up"].grad = None
    assert report_on(model).ok


def check_replicas_that_a_group_counts_twice() -> None:
    report = report_on(Mixture(0), group=dist.group.WORLD)
    assert not report.ok
    assert report.norms == [pytest.approx(2 * report.norm, rel=1e-6)] * 4
    assert report.call == "torchclip.clip_grad_norm_(model.parameters(), 1.0)"


def check_rounding_is_no_difference() -> None:
    rank = dist.get_rank()
    for size in (3, 1 << 19):
        for apart, is_same in ((1e-6, True), (1e-4, False), (1.0, False)):
            p = nn.Parameter(torch.zeros(size))
            noise = randn(size, seed=1 + rank)
            p.grad = randn(size, seed=0)
            p.grad += (apart * p.grad.norm() / noise.norm() if rank == 3 else 0) * noise
            assert (torchclip.check_ranks([p]).different == []) == is_same, (size, apart)


def check_weights_are_compared_by_their_elements() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        p = nn.Parameter(randn(300_000, dtype=dtype))
        p.grad = randn(300_000, dtype=dtype, seed=1)
        assert torchclip.check_ranks([p]).ok
        with torch.no_grad():
            swapped = p[[299_999, 0]] if dist.get_rank() == 1 else p[[0, 299_999]]
            p[0], p[299_999] = swapped
        report = torchclip.check_ranks([p])
        assert report.local == ["[0]"], dtype


def check_unusual_gradients() -> None:
    embedding = nn.Embedding(8, 3, sparse=True)
    nn.init.ones_(embedding.weight)
    embedding(torch.tensor([1, 5, 1])).sum().backward()
    shared = nn.Parameter(torch.zeros(3))
    shared.grad = torch.ones(3)
    other = nn.Parameter(torch.zeros(3))
    other.grad = shared.grad
    empty = nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    report = report_on([embedding.weight, shared, other, shared, empty])
    assert report.ok
    assert report.norm == pytest.approx(math.sqrt(3 * 4 + 3 + 3))
    shared.grad[0] = math.nan
    report = torchclip.check_ranks([shared])
    assert report.ok
    assert math.isnan(report.norm)
    assert "The gradient is not finite." in words_of(report)


@since_2_7
def check_fsdp2() -> None:
    for mesh in (None, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))
        fully_shard(model, mesh=mesh)
        model(randn(4, 7, seed=dist.get_rank())).sum().backward()
        report = report_on(model)
        assert report.ok
        assert (report.local, report.different, report.missing) == ([], [], {})
        assert "DTensors, whose parts are joined" in words_of(report)
    grad: Any = model[0].weight.grad
    if dist.get_rank() == 1:  # one of two replicas of this part
        grad.to_local().mul_(2)
    assert torchclip.check_ranks(model).different == ["0.weight"]


def check_tensor_parallelism_within_replicas() -> None:
    """The replicas along dp are on other meshes, and not counted."""
    mesh = grid()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.LayerNorm(6))
    parallelize_module(model, mesh["ep"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    model(randn(4, 6)).square().sum().backward()
    report = report_on(model)
    assert report.ok
    counted_twice = report_on(model, group=mesh.get_group("dp"))
    assert counted_twice.norms == [pytest.approx(math.sqrt(2) * report.norm, rel=1e-6)] * 4
    assert counted_twice.call == "torchclip.clip_grad_norm_(model.parameters(), 1.0)"


def check_stages_and_experts_on_meshes_of_their_own() -> None:
    """With a group, DTensors that its ranks have on a common mesh count once: one call is right for all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "fsdp"))
    of_all = init_device_mesh("cpu", (4,))
    other = mesh.get_local_rank("other")

    def sharded(seed: int, on: DeviceMesh) -> nn.Parameter:
        p = nn.Parameter(split(randn(6, 2, seed=seed + 50), on, Shard(0)))
        p.grad = split(randn(6, 2, seed=seed), on, Shard(0))
        return p

    stages = nn.ParameterDict({f"stage{other}": sharded(other, mesh["fsdp"])})
    experts = nn.ParameterDict({"dense": sharded(0, of_all), "expert": sharded(1 + other, mesh["fsdp"])})
    for model, local_names in ((stages, ["stage0", "stage1"]), (experts, ["expert"])):
        report = report_on(model)
        assert report.local == local_names
        assert report.call == (
            'torchclip.clip_grad_norm_(model.parameters(), 1.0, group=mesh["other"].get_group())'
        )
        assert report_on(model, group=mesh.get_group("other")).ok
        total_norm = torchclip.clip_grad_norm_(model.parameters(), 1.0, group=mesh.get_group("other"))
        assert total_norm == pytest.approx(report.norm, rel=1e-6)


def check_sums_that_are_pending() -> None:
    mesh = init_device_mesh("cpu", (4,))
    full = randn(6, 4)
    p = parameter(addends(full, mesh, Partial()))
    q = parameter(split(full, mesh, Shard(0)), like=split(full, mesh, Replicate()))
    report = report_on([p, q])
    assert report.ok
    assert report.norm == pytest.approx(math.sqrt(2) * float(full.norm()), rel=1e-6)


def check_a_mesh_without_some_ranks() -> None:
    inner = DeviceMesh("cpu", [0, 1, 2])
    p = parameter(split(randn(6, 2), inner, Shard(0)))
    report = report_on([p])
    assert report.missing == {"[0]": (3,)}
    assert report.norms[3] == 0
    assert not report.ok


def check_clippers_and_optimizers() -> None:
    mesh = grid()
    model = Mixture(expert_on(mesh), dense=False)
    unnamed = torch.optim.SGD(model.parameters(), lr=0.1)
    assert torchclip.check_ranks(unnamed).local == ["[0]", "[1]"]
    with_names = torch.optim.SGD(model.named_parameters(), lr=0.1)
    report = torchclip.check_ranks(with_names)
    assert report.local == ["expert.down", "expert.up"]
    clipper = torchclip.Clipper(with_names, max_norm=1.0)
    report = torchclip.check_ranks(clipper)
    assert report.call == f"clipper = torchclip.Clipper(optimizer, max_norm=1.0, group={EP})"
    clipper.detach()
    clipper = torchclip.Clipper(with_names, max_norm=1.0, group=mesh.get_group("ep"))
    report = torchclip.check_ranks(clipper)
    assert report.ok
    with_names.step()
    assert clipper.history[-1].total_norm == pytest.approx(report.norm, rel=1e-6)
    with pytest.raises(ValueError, match="`group` is that of the Clipper"):
        torchclip.check_ranks(clipper, group=mesh.get_group("ep"))
    several = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    report = torchclip.check_ranks(several)
    assert report.local == ["[0]", "[1]"]
    assert report.call == f"torchclip.clip_grad_norm_(parameters, 1.0, group={EP})"


def check_a_clipper_without_its_exempt_groups() -> None:
    expert = ("expert", local(10 + expert_on(grid()), 2))
    groups: list[Any] = [{"params": [expert], "max_norm": None}, {"params": [("router", local(1, 2))]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clipper = torchclip.Clipper(optimizer, max_norm=1.0)
    report = torchclip.check_ranks(clipper)
    assert report.ok
    assert report.local == []
    optimizer.step()
    assert clipper.history[-1].total_norm == pytest.approx(report.norm, rel=1e-6)
    assert torchclip.check_ranks(optimizer).local == ["expert"]


@world_of(2)
def check_a_refusal_on_one_rank_raises_on_all() -> None:
    good: Any = [local(0, 3)]
    refused: tuple[Any, ...] = ("a model", [1.0], [nn.Parameter(torch.zeros(2, device="meta"))])
    for bad in refused:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            torchclip.check_ranks(good if dist.get_rank() == 0 else bad)
        is_told = "rank 1 refused its arguments" in str(error.value)
        assert is_told == (dist.get_rank() == 0)
    assert torchclip.check_ranks(good).ok


def check_install_with_a_group() -> None:
    mesh = grid()
    ep, dp = mesh.get_group("ep"), mesh.get_group("dp")

    def parameters() -> list[Any]:
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0]) * (1 + dist.get_rank())
        return [p]

    alone = 5.0 * (1 + dist.get_rank())
    over_ep = float(torchclip.get_total_norm([grad_of(p) for p in parameters()], group=ep))
    over_dp = float(torchclip.get_total_norm([grad_of(p) for p in parameters()], group=dp))
    assert len({alone, over_ep, over_dp}) == 3
    clip: Any = lambda *args, **kwargs: float(torch.nn.utils.clip_grad_norm_(*args, **kwargs))  # noqa: E731
    try:
        torchclip.install(group=ep)
        assert clip(parameters(), 1.0) == over_ep
        assert clip(parameters(), 1.0, group=dp) == over_dp
        assert clip(parameters(), 1.0, group=None) == alone
        total_norm = torch.nn.utils.get_total_norm([grad_of(p) for p in parameters()])
        assert total_norm == over_ep
        torch.nn.utils.clip_grads_with_norm_(parameters(), 1.0, total_norm)
        torch.nn.utils.clip_grad_value_(parameters(), 1.0)
        with torchclip.installed(group=[dp]):
            assert clip(parameters(), 1.0) == over_dp
            with torchclip.installed():
                assert clip(parameters(), 1.0) == over_dp
        assert clip(parameters(), 1.0) == over_ep
        torchclip.install()
        assert clip(parameters(), 1.0) == alone
        with torchclip.installed(group=ep):
            assert clip(parameters(), 1.0) == over_ep
        assert clip(parameters(), 1.0) == alone
    finally:
        torchclip.uninstall()
    with torchclip.installed():
        assert clip(parameters(), 1.0) == alone
