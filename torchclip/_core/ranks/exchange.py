"""The one way in which ranks agree: sums of integers over process groups.

Every exchange begins with a reduction of the same size and operation, as unequal ones could hang.  It has a
head and up to four norms (``limbs``).  A number in the head stands for the call: if the sums of the numbers
and of their squares are those of equal ones, all ranks make the same call.

More norms, or an order without exact powers, take further reductions.  On the host these follow if nothing is
wrong.  On an accelerator, where reading the head would wait, they follow in any case; if anything is wrong
the norms are NaN, and a later call raises the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core.batch import Norms
from torchclip._core.ranks import limbs, meshes
from torchclip._core.ranks.meshes import Ranks
from torchclip._core.scalars import on_device

_SLOTS = 4
"""How many norms travel with the head."""
_VERSION = 3
# The words of a head: 1 for each rank, the number of the call and its square; 1 for each rank that refuses,
# its number and the square; what adds up to 0 if replicas do not differ; and 1 for each fact.
_RANKS, _CALL, _CALL_SQUARED, _REFUSALS, _WHO, _WHO_SQUARED, _REPLICAS, _FACTS = range(8)
_HEAD = _FACTS + 6


class Kind:
    """The kind of a call, in words.  Ranks that are at calls of different kinds are out of step."""

    CLIP: Final = "clipping by the total norm (clip_grad_norm_, or a Clipper's step)"
    MEASURE: Final = "measuring the total norm (get_total_norm)"
    CLIP_EACH: Final = "clipping each gradient, or its rows, by its norm"
    MEASURE_EACH: Final = "measuring the norm of each gradient (Clipper.norms)"
    MEAN_LOSS: Final = "deciding by the mean loss (skip_loss_above)"
    CONNECT: Final = "finding the ranks that `group` connects"


@dataclass
class Call:
    """What all exchanges of a call need to know.

    Attributes:
        kind: of ``Kind``.
        norm_type: the order of the norms.
        facts: of this rank; after an exchange on the host, of all ranks that took part.
        lacking: the replicas' gradients that this rank lacks, in words.
        refused: 1 + the rank that refused its arguments, or found others out of step; 0 if none did.
        error: what to raise after the last exchange.
    """

    kind: str
    norm_type: float
    facts: int = 0
    lacking: str = ""
    refused: int = 0
    error: str | None = None

    def fail(self, error: str) -> None:
        """Tell the ranks of all further exchanges that this call failed."""
        self.error = self.error or error
        self.refused = self.refused or 1 + dist.get_rank()


# Of process groups whose ranks are out of step: what all further calls raise.
_errors: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()
# Sums of heads on their way from an accelerator: the event that shows the arrival, the sum, the process
# groups, the number of norms and a copy of the call.
_verdicts: list[tuple[Any, Tensor, Sequence[dist.ProcessGroup], int, Call]] = []
# What was first wrong with an earlier exchange on an accelerator, which the next call raises.
_late: list[str] = []
# By the first of several groups: the ranks that it connects together with the others.
_connected: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[dist.ProcessGroup, ...], Ranks]] = (
    WeakKeyDictionary()
)


def exchange(
    groups: Sequence[dist.ProcessGroup], norms: Norms, call: Call, device: str, replicas: int = 0
) -> Norms:
    """Join each norm with the norms that other ranks have in its place.

    Args:
        groups: process groups that together connect the ranks: each is summed over after the other.
        norms: this rank's norms, or ``ABSENT``.
        call: the call; it receives what other ranks know.
        device: the type of the device that the groups' collectives work on.
        replicas: a number whose sum over all ranks is 0 if replicas do not differ.

    Returns:
        The joint norms, the same bits on every rank, NaN if anything was wrong; a tensor on an accelerator.
    """
    count, p = len(norms), call.norm_type
    if not _may_exchange(groups, call):
        return [math.nan] * count
    sent, on_host = _readable(norms, device)
    first, more = (sent[:_SLOTS], sent[_SLOTS:]) if p in limbs.EXACT else (sent[:0], sent)
    message = _reduce(_message(limbs.words(first, p), count, call, replicas), dist.ReduceOp.SUM, groups)
    right = _is_right(message[:_HEAD], groups, count, call, on_host)
    if right is False:
        return [math.nan] * count
    total = message[_HEAD:].view(_SLOTS, limbs.WORDS)[: len(first)]
    if p not in limbs.EXACT:
        joint = _joint_by_shares(more, p, groups, on_host)
    else:
        if len(more):
            total = torch.cat([total, _reduce(limbs.words(more, p), dist.ReduceOp.SUM, groups)])
        joint = limbs.joint(total, p, on_host)
    return torch.where(cast("Tensor", right), joint, math.nan) if isinstance(joint, Tensor) else joint


def _joint_by_shares(norms: Norms, p: float, groups: Sequence[dist.ProcessGroup], on_host: bool) -> Norms:
    """The joint norms of an order whose powers may leave every range: first the leading ones."""
    own = on_device(norms, "cpu") if on_host else cast("Tensor", norms)
    leading = limbs.leading(_reduce(limbs.keys(own, p), dist.ReduceOp.MAX, groups), p)
    if not math.isinf(p):
        shares = limbs.shares(own, leading, p)
        words = limbs.words(shares.tolist() if on_host else shares, 1.0)
        total = limbs.joint(_reduce(words, dist.ReduceOp.SUM, groups), 1.0, on_host)
        leading = limbs.from_shares(leading, on_device(total, leading.device), p)
    return leading.tolist() if on_host else leading


def connected(groups: Sequence[dist.ProcessGroup], call: Call) -> Ranks:
    """The ranks that process groups connect; those of several groups are asked once, and waited for.

    If that fails, the call fails, and there are none.
    """
    if len(groups) == 1:
        return meshes.ranks_of(groups[0])
    known, others = _connected.setdefault(groups[0], {}), tuple(groups[1:])
    if others not in known:
        device = meshes.device_of(groups[0])
        ask = replace(call, kind=Kind.CONNECT, norm_type=0.0)
        agreed = exchange(groups, [0.0], ask, device)
        _read_verdicts(wait=True)
        if math.isnan(agreed[0]):
            call.fail(ask.error or _late.pop())
            return frozenset()
        call.error = call.error or ask.error
        here = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
        here[dist.get_rank()] = 1
        times = _reduce(here, dist.ReduceOp.SUM, groups).tolist()
        if max(times) > 1:
            raise ValueError(
                "the process groups in `group` must cross each other, so that any two ranks are connected in "
                f"only one way; rank {dist.get_rank()} is connected to some ranks several times"
            )
        known[others] = None if min(times) else frozenset(i for i, is_there in enumerate(times) if is_there)
    return known[others]


def raise_pending() -> None:
    """Raise the error of an earlier exchange on an accelerator, which could not be read at the time.

    Call it where a norm from an exchange is read: it waits for the exchange.
    """
    _read_verdicts(wait=True)
    if _late:
        raise RuntimeError(_late.pop())


# Heads


def _message(words: Tensor, count: int, call: Call, replicas: int) -> Tensor:
    """The head and the words of the first norms, of the same size for any number of them."""
    number, who = _number(count, call), call.refused
    facts = [call.facts >> i & 1 for i in range(_HEAD - _FACTS)]
    head = torch.tensor([1, number, number**2, who > 0, who, who**2, replicas, *facts], device="cpu")
    rest = words.new_zeros((_SLOTS - len(words)) * limbs.WORDS)
    return torch.cat([head.to(words.device, non_blocking=True), words.flatten(), rest])


def _number(count: int, call: Call) -> int:
    """A number of 20 bits that stands for a call: sums of its square over 2²³ ranks stay in range."""
    return crc32(repr((_VERSION, call.kind, call.norm_type + 0.0, count)).encode()) >> 12


def _is_right(
    total: Tensor, groups: Sequence[dist.ProcessGroup], count: int, call: Call, on_host: bool
) -> bool | Tensor:
    """Whether nothing is wrong, by the sum of all heads; a tensor where the host does not wait for it."""
    if on_host:
        return _learn(total.tolist(), groups, count, call)
    _verdicts.append((*_to_host(total), groups, count, replace(call)))
    number, (ranks, *sums) = _number(count, call), total[: _CALL_SQUARED + 1].unbind()
    is_same = (sums[0] == ranks * number) & (sums[1] == ranks * number**2)
    right: Tensor = is_same & (total[_REFUSALS] == 0) & (total[_REPLICAS] == 0)
    return right


def _learn(total: Sequence[int], groups: Sequence[dist.ProcessGroup], count: int, call: Call) -> bool:
    """Take note of what the sum of all heads says: the facts of all ranks, or an error, and then False."""
    ranks, number = total[_RANKS], _number(count, call)
    refusals, who = total[_REFUSALS], total[_WHO]
    if refusals:
        is_one = refusals * total[_WHO_SQUARED] == who**2
        call.refused = call.refused or (who // refusals if is_one else 0)
        call.fail(_refusal(f"rank {who // refusals - 1}" if is_one else f"{refusals} ranks"))
        return False
    if (total[_CALL], total[_CALL_SQUARED]) != (ranks * number, ranks * number**2):
        error = _out_of_step(ranks, count, call)
        call.fail(error)
        _errors.update(dict.fromkeys(groups, error))
        return False
    if total[_REPLICAS]:
        call.fail(_different_replicas(call))
        return False
    call.facts = sum((known > 0) << i for i, known in enumerate(total[_FACTS:]))
    return True


def _refusal(who: str) -> str:
    return (
        f"{who} refused its gradients or an argument, or found other ranks out of step, as its own error "
        "says; so this call was called off on all ranks that wait for it, and no gradient was changed"
    )


def _out_of_step(ranks: int, count: int, call: Call) -> str:
    return (
        f"ranks are out of step: of {ranks} ranks this one is {call.kind}, with {count} norms "
        f"of order {call.norm_type}, and another is not (as its own error says) or has another version "
        "of torchclip. All ranks must make the same calls with the same parameters in the same order. They "
        "cannot be in step again, so each further call on this process group raises this error; make the "
        "group anew, as by starting again from a checkpoint"
    )


def _different_replicas(call: Call) -> str:
    here = f"this rank lacks that of {call.lacking}" if call.lacking else "others lack some that this one has"
    return (
        f"ranks with replicas of the same parameters have gradients of different ones: {here}. Set those "
        "that are missing to zeros, or those of the other replicas to None; no gradient was changed (on an "
        "accelerator all became NaN)"
    )


# What is known of earlier exchanges


def _may_exchange(groups: Sequence[dist.ProcessGroup], call: Call) -> bool:
    """Whether no earlier exchange has found the ranks out of step; else the call fails."""
    _read_verdicts(wait=False)
    if _late:  # other ranks may not have read it yet, so this rank still takes part, and then raises it
        call.error = call.error or _late.pop()
    errors = [_errors[group] for group in groups if group in _errors]
    if errors:
        call.fail(errors[0])
    return not errors


def _to_host(words: Tensor) -> tuple[Any, Tensor]:
    """A copy in host memory, and the event that shows its arrival."""
    if words.is_cpu:  # within a transform, where nothing can be read
        return None, words
    there = torch.empty_like(words, device="cpu", pin_memory=True).copy_(words, non_blocking=True)
    arrived = torch.get_device_module(words.device).Event()
    arrived.record()
    return arrived, there


def _read_verdicts(wait: bool) -> None:
    """Take note of what has arrived from the accelerator."""
    while _verdicts:
        arrived, total, groups, count, call = _verdicts[0]
        if arrived is not None and not arrived.query():
            if not wait:
                return
            arrived.synchronize()
        del _verdicts[0]
        call.error = None
        if not _learn(total.tolist(), groups, count, call):
            _late[:] = _late or [str(call.error)]


# Tensors


def _readable(norms: Norms, device: str) -> tuple[Norms, bool]:
    """Norms as a list if they can be read, or a tensor on the groups' device; and whether they can be."""
    if device == "cpu" and torch._C._functorch.maybe_current_level() is None:
        return norms.detach().tolist() if isinstance(norms, Tensor) else norms, True
    return on_device(norms, device), False


def _reduce(words: Tensor, op: Any, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The sum or the maximum of all ranks' words, in place of this rank's."""
    for group in groups:
        dist.all_reduce(words, op, group=group)
    return words
