"""Checks of the Clipper that all ranks run together: they must make the same decisions."""

import itertools
import math
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_helpers import since_2_7
from dtensors import parameter, split
from helpers import bits, grad_of, last_of, randn, with_gradients
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard

import torchclip
from torchclip import AdaGC, BlockRMS, Clipper, Percentile, RollingSigma
from torchclip.clipper import Scope

INF = math.inf
SCOPES: list[Scope] = ["global", "group", "parameter"]


def lying(full: Tensor, *placements: Placement) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return split(full, mesh, *placements)


def agreed(value: Any) -> None:
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, repr(value))
    assert len(set(everyones)) == 1, everyones


def model_of(*layers: nn.Module, wrap: Any = fully_shard) -> tuple[nn.Module, Any]:
    """A model of these layers, and the wrapped one."""
    model = nn.Sequential(*layers)
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=i)
    return model, wrap(model)


def check_norms_where_only_some_ranks_have_a_gradient() -> None:
    first, second, plain = (randn(8, 3, seed=i) for i in range(3))
    sharded = lying(first, Shard(0))
    parameters = [
        parameter(sharded if dist.get_rank() != 1 else None, sharded),
        parameter(lying(second, Shard(0)), lying(second, Shard(0))),
        parameter(plain, plain),
    ]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clipper = Clipper(optimizer, 1.0)
    norms = clipper.norms()
    held = math.hypot(*(float(part.norm()) for i, part in enumerate(first.chunk(4)) if i != 1))
    expected = {"[1]": float(second.norm()), "[2]": float(plain.norm())}
    if dist.get_rank() != 1:
        expected["[0]"] = held
    assert norms == {f"param_groups[0]['params']{i}": pytest.approx(n) for i, n in expected.items()}
    for each in parameters:
        each.grad = None
    parameters[1].grad = lying(second, Shard(0)) if dist.get_rank() == 2 else None
    assert len(clipper.norms()) == (dist.get_rank() == 2)


def check_user_code_on_one_rank_only() -> None:
    """No rank may measure again by itself, and the common decision stands, also about elements to zero."""
    full = randn(8, 3)
    spoilt = full.clone()
    spoilt[7, 1] = math.nan  # which the last rank holds
    for scope, listener, (values, policy) in itertools.product(
        SCOPES, (0, 3), ((full, "propagate"), (spoilt, "zero"))
    ):
        p = parameter(lying(values, Shard(0)), lying(values, Shard(0)))
        optimizer = torch.optim.SGD([p], lr=1.0)
        seen: list[float] = []
        on_clip = (lambda r, seen=seen: seen.append(r.total_norm)) if dist.get_rank() == listener else None
        clipper = Clipper(optimizer, 0.5, scope=scope, nonfinite=policy, on_clip=on_clip)  # type: ignore[arg-type]
        optimizer.step()
        assert len(seen) == (dist.get_rank() == listener)
        agreed(list(clipper.history))
        clipped = p.grad.full_tensor()
        assert policy == "propagate" or clipped[7, 1] == 0
        assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-5)


def check_no_gradient_means_none_on_any_rank() -> None:
    """Thresholds learn on every rank or on none."""
    for scope in SCOPES[:2]:
        mine = parameter(None, torch.zeros(2))
        optimizer = torch.optim.SGD([mine], lr=1.0)
        clipper = Clipper(optimizer, Percentile(100), scope=scope, group=dist.group.WORLD)
        for rank in (None, 2, None, 0):
            mine.grad = torch.tensor([3.0, 4.0]) if dist.get_rank() == rank else None
            optimizer.step()
        agreed((list(clipper.history), clipper.state_dict()["thresholds"]))
        (threshold,) = clipper.thresholds.values()
        assert threshold.state_dict()["norms"] == [5.0, 5.0]
        assert [r.clip_coef for r in clipper.history] == [1.0] * 4


def check_ranks_scale_alike_whatever_only_one_of_them_has() -> None:
    """Parameters that every rank has a copy of stay equal, bit for bit."""
    here_only: dict[str, list[Tensor]] = {
        "gaps": [torch.ones(4, 4)[:, ::2]],
        "float64": [torch.ones(3, dtype=torch.float64)],
        "shared": [same_again := torch.ones(3), same_again],
        "many elements": [torch.ones(600_000)],
    }
    for grads in here_only.values():
        others = grads if dist.get_rank() == 1 else []
        parameters = with_gradients([randn(1000, seed=1), *others])
        optimizer = torch.optim.SGD(parameters, lr=0.3, fused=True)
        Clipper(optimizer, 0.37, group=dist.group.WORLD)
        optimizer.step()
        agreed([bits(parameters[0]), bits(parameters[0].grad)])


@since_2_7
def check_the_step_that_creates_an_optimizers_state() -> None:
    model, _ = model_of(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    clipper = Clipper(optimizer, Percentile())
    state_dict.get_optimizer_state_dict(model, optimizer)
    assert clipper.last is None
    assert clipper.thresholds["all"].state_dict()["norms"] == []
    model(randn(3, 4)).sum().backward()
    optimizer.step()
    assert last_of(clipper).step == 0
    assert last_of(clipper).total_norm == pytest.approx(
        float(torchclip.get_total_norm([grad_of(p) for p in model.parameters()])), rel=1e-6
    )


@since_2_7
def check_names_and_layers_of_distributed_models() -> None:
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        model, wrapped = model_of(nn.Linear(4, 4), nn.Linear(4, 2), wrap=wrap)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        clipper = Clipper(optimizer, 1.0, model=wrapped, layers_every=2)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(randn(3, 4)).sum().backward()
            optimizer.step()
        names = [name for name, _ in model.named_parameters()]
        assert sorted(clipper.norms()) == sorted(names)
        assert (clipper.history.layers.names, clipper.history.layers.steps) == (names, [0, 2])
        agreed(clipper.history.layers.norms.tolist())
        first = clipper.history.layers.norms[0].tolist()
        assert math.hypot(*first) == pytest.approx(clipper.history[0].total_norm)


def check_rules_go_by_the_norms_of_whole_parameters() -> None:
    """Sharded parameters are clipped, and steps skipped, as without sharding."""
    fulls = [randn(6, 3, seed=1), randn(5, seed=2)]  # of which some ranks hold more than others
    ways: list[dict[str, Any]] = [
        {"max_norm": AdaGC(warmup=2, max_norm=1.5)},
        {"max_norm": INF, "skip_above": RollingSigma(window=3, warmup=2)},
        {"max_norm": BlockRMS(0.5)},
    ]
    for way in ways:
        whole = [parameter(None, full) for full in fulls]
        sharded = [parameter(None, lying(full, Shard(0))) for full in fulls]
        optimizers = [torch.optim.SGD(parameters, lr=1.0) for parameters in (whole, sharded)]
        alone, together = (Clipper(optimizer, **way) for optimizer in optimizers)
        for factor in (1.0, 1.1, 0.4, 30.0, 1.0):
            for full, in_one_piece, in_parts in zip(fulls, whole, sharded, strict=True):
                in_one_piece.grad, in_parts.grad = factor * full, lying(factor * full, Shard(0))
            for optimizer in optimizers:
                optimizer.step()
        for in_one_piece, in_parts in zip(whole, sharded, strict=True):
            torch.testing.assert_close(in_parts.full_tensor(), in_one_piece)
        assert [r.skipped for r in together.history] == [r.skipped for r in alone.history]
        assert [r.clipped for r in together.history] == [r.clipped for r in alone.history]
        assert any(r.clipped or r.skipped for r in alone.history)
        agreed(together.state_dict())


def through_dcp(clipper: Clipper, fresh: Clipper) -> None:
    paths = [tempfile.mkdtemp()]
    dist.broadcast_object_list(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"clipper": clipper}, checkpoint_id=paths[0])
        dcp.load({"clipper": fresh}, checkpoint_id=paths[0])


@since_2_7
def check_a_checkpoint_of_what_ranks_have_together() -> None:
    """All ranks have the same state, on which DCP relies."""

    def make(group: Any) -> tuple[Any, Any, Clipper]:
        full = randn(8, 3)
        p = parameter(None, lying(full, Shard(0)) if group is None else full)
        optimizer = torch.optim.SGD([p], lr=1.0)
        limit = RollingSigma(window=3, warmup=2)
        return p, optimizer, Clipper(optimizer, Percentile(30), skip_above=limit, group=group, layers_every=1)

    for group in (None, dist.group.WORLD):
        p, optimizer, clipper = make(group)
        for step in range(4):
            mine = randn(8, 3, seed=10 * step + (dist.get_rank() if group is not None else 0))
            p.grad = lying(mine, Shard(0)) if group is None else mine
            optimizer.step()
        _, _, its_clipper = held = make(group)
        through_dcp(clipper, its_clipper)
        assert its_clipper.state_dict() == clipper.state_dict()
        shared = {**clipper.state_dict(), "history": list(clipper.history)}
        agreed({key: value for key, value in shared.items() if not key.startswith("of ")})
        assert len(its_clipper.history.layers) == 4
        del held


@since_2_7
def check_a_checkpoint_of_stages_of_a_pipeline() -> None:
    """Each rank gets back what it has learned, whether its parameters have names or not."""
    rank = dist.get_rank()

    def make(named: bool, scope: Scope) -> tuple[Any, Any, Clipper]:
        stage = nn.ModuleDict({f"layer {rank}": nn.Linear(3, 2)})
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.0)
        return (
            stage,
            optimizer,
            Clipper(optimizer, Percentile(50), scope=scope, model=stage if named else None, layers_every=1),
        )

    for named, scope in itertools.product((False, True), SCOPES):
        stage, optimizer, clipper = make(named, scope)
        for step in range(3):
            for i, p in enumerate(stage.parameters()):
                p.grad = randn(*p.shape, seed=100 * rank + 10 * step + i)
            optimizer.step()
        other_stage, other_optimizer, its_clipper = make(named, scope)
        through_dcp(clipper, its_clipper)
        assert its_clipper.state_dict() == clipper.state_dict()
        assert list(its_clipper.history) == list(clipper.history)
        del other_stage, other_optimizer


def check_backward_passes_that_add_to_sharded_gradients_are_noticed() -> None:
    weights = [nn.Parameter(lying(randn(4, 2, seed=i), Shard(0))) for i in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    clipper = Clipper(optimizers, 1.0)
    only_last = torch.zeros(4, 2)
    only_last[1::2, 1] = 1.0  # all other elements of the gradient stay as they are
    torch.add(weights[0].sum(), weights[1].sum()).backward()  # type: ignore[no-untyped-call]
    optimizers[0].step()
    (weights[1] * lying(only_last, Shard(0))).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"optimizer 1 \(SGD\) have changed"):
        optimizers[1].step()
    clipper.detach()


@since_2_7
def check_losses_of_sharded_models_are_added() -> None:
    model, _ = model_of(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper(optimizer, 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        for loss in (1.0, 2.0, 4.0):
            model(randn(3, 4, seed=1)).sum().backward()
            clipper.loss = loss
        optimizer.step()
    assert [record.loss for record in clipper.history] == [7.0, 7.0]


@since_2_7
def check_rounds_of_sharded_models() -> None:
    """One norm for both optimizers, whichever steps first, as by hand."""
    for order in ((0, 1), (1, 0)):
        models = []
        for _ in range(2):
            model, _ = model_of(nn.Linear(4, 4), nn.Linear(4, 2))
            ps = list(model.parameters())
            models.append((model, [torch.optim.SGD(ps[::2], lr=0.1), torch.optim.AdamW(ps[1::2], lr=0.1)]))
        (model, optimizers), (by_hand, others) = models
        clipper = Clipper(optimizers, 0.5)
        for step in range(3):
            for each, its in models:
                for optimizer in its:
                    optimizer.zero_grad()
                each(randn(3, 4, seed=step)).square().sum().backward()
            norm = torchclip.clip_grad_norm_(by_hand.parameters(), 0.5)
            for i in order:
                optimizers[i].step()
                others[i].step()
            assert last_of(clipper).total_norm == pytest.approx(float(norm), rel=1e-6)
        for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs.full_tensor())  # type: ignore[attr-defined]
        agreed(list(clipper.history))


@since_2_7
def check_sharded_gradients_in_the_backward_pass() -> None:
    """Rules without a norm clip there, and record the norm of a rank's own part; others are refused."""
    for max_norm in (torchclip.Value(0.1), INF):
        (model, _), (by_hand, _) = models = [
            model_of(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2)
        ]
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def step(p: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
        its = torch.optim.SGD(by_hand.parameters(), lr=0.1)
        clippers = [Clipper(optimizer, max_norm) for optimizer in optimizers.values()]
        for number in range(3):
            for each, _ in models:
                each(randn(3, 4, seed=number)).square().sum().backward()
            grads = [p.grad for p in by_hand.parameters() if p.grad is not None]
            parts = [grad.to_local() for grad in grads]  # type: ignore[attr-defined]
            norms = [float(part.norm()) for part in parts]
            if max_norm != INF:
                torchclip.clip_grad_value_(by_hand.parameters(), 0.1)
            its.step()
            assert [len(clipper.history) for clipper in clippers] == [number + 1] * len(clippers)
            found = [last_of(clipper).total_norm for clipper in clippers]
            assert found == pytest.approx(norms, rel=1e-6)
            for clipper, norm, part in zip(clippers, norms, parts, strict=True):
                expected = float(part.norm()) / norm if norm else 1.0
                assert last_of(clipper).clip_coef == pytest.approx(expected, rel=1e-6)
            its.zero_grad()
        for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs.full_tensor())  # type: ignore[attr-defined]
        for clipper in clippers:
            clipper.detach()
        refused = [Clipper(optimizer, 1.0) for optimizer in optimizers.values()]
        with pytest.raises(RuntimeError, match="are sharded"):
            model(randn(3, 4, seed=9)).square().sum().backward()
        assert [len(each.history) for each in refused] == [0] * len(refused)


def with_loss_of_its_own(
    clipper: Clipper, optimizer: torch.optim.Optimizer, model: nn.Module, loss: Any
) -> None:
    optimizer.zero_grad()
    model(randn(3, 4, seed=1)).square().mean().backward()
    clipper.loss = loss
    optimizer.step()


@since_2_7
def check_ranks_skip_by_the_mean_of_their_losses() -> None:
    """Of replicas (DDP), of shards (FSDP2), and of ranks that `group` joins."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = nn.Linear(4, 2)
    for i, p in enumerate(plain.parameters()):
        p.data = randn(*p.shape, seed=i)
    replicated = nn.parallel.DistributedDataParallel(plain)
    sharded, _ = model_of(nn.Linear(4, 2))
    alone, _ = model_of(nn.Linear(4, 2), wrap=lambda model: model)
    ways: list[tuple[nn.Module, dict[str, Any]]] = [
        (replicated, {"model": replicated}),
        (sharded, {}),
        (alone, {"group": dist.group.WORLD}),
    ]
    for model, options in ways:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = Clipper(optimizer, INF, skip_loss_above=RollingSigma(warmup=3), **options)
        before = [p.detach().clone() for p in model.parameters()]
        # The means are 1, 2, 1, 1, and 1 + a jump on a single rank.
        for mean in (1.0, 2.0, 1.0, 1.0):
            with_loss_of_its_own(clipper, optimizer, model, mean * (rank + 1) * 2 / (world + 1))
        moved = [p.detach().clone() for p in model.parameters()]
        assert not any(torch.equal(*pair) for pair in zip(before, moved, strict=True))
        with_loss_of_its_own(clipper, optimizer, model, 1.0 + 1000 * (rank == world - 1))
        assert last_of(clipper).skipped
        assert all(map(torch.equal, moved, model.parameters()))
        assert last_of(clipper).loss == 1.0 + 1000 * (rank == world - 1)
        learned = clipper.state_dict()
        agreed([record.skipped for record in clipper.history])
        part = (
            learned
            if "skip_loss_above" in learned
            else learned[next(k for k in learned if k.startswith("of "))]
        )
        assert part["skip_loss_above"]["all"]["norms"] == pytest.approx([1.0, 2.0, 1.0, 1.0], rel=1e-15)
        agreed([float(norm).hex() for norm in part["skip_loss_above"]["all"]["norms"]])
        clipper.detach()


@since_2_7
def check_a_rank_without_a_loss_stops_all_of_them() -> None:
    model, _ = model_of(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper(optimizer, INF, skip_loss_above=100.0)
    mine = dist.get_rank() == 1
    with pytest.raises(RuntimeError, match=r"clipper\.loss = loss" if mine else "rank 1 refused"):
        with_loss_of_its_own(clipper, optimizer, model, None if mine else 1.0)
    with_loss_of_its_own(clipper, optimizer, model, 1.0)
    assert len(clipper.history) == 1
    for losses in ([INF, 1.0], [math.nan, 1.0], [-1.0, 200.0]):
        with_loss_of_its_own(clipper, optimizer, model, losses[0] if mine else losses[1])
    # A loss below 0 does not count in the mean; one that is not a number makes it so.
    assert [r.skipped for r in clipper.history] == [False, True, False, True]


def check_a_loss_is_not_judged_where_it_is_not_known_which_ranks_decide() -> None:
    optimizer = torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="nothing shows which ranks these are: pass the DistributedDataParallel"
    ):
        Clipper(optimizer, 1.0, skip_loss_above=5.0)
    optimizer.step()  # it has no Clipper


@since_2_7
def check_updates_are_those_of_whole_parameters() -> None:
    """All ranks have the same norms of sharded weights and of what a step adds to them."""
    model, _ = model_of(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper(optimizer, INF, layers_every=1, updates=True, model=model)
    before: list[Any] = [p.full_tensor().detach().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    model(randn(3, 4, seed=1)).square().mean().backward()
    optimizer.step()
    updates = clipper.history.layers.updates
    agreed(updates)
    for old, p, (update,) in zip(before, model.parameters(), updates.values(), strict=True):
        new = p.full_tensor().detach()  # type: ignore[attr-defined]
        assert update.weight == pytest.approx(float(old.norm()), rel=1e-6)
        assert update.update == pytest.approx(float((new - old).norm()), rel=1e-4)
