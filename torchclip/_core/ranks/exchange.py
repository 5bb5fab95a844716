"""The one way in which ranks agree: sums of integers over process groups.

Every exchange begins with a reduction of the same size and operation, whatever a rank is about to do, as
reductions of unequal size could hang.  It has a head and up to four norms (``limbs``).  The head says whether
all ranks make the same call: a number stands for the call, and if all ranks have the same number, the sum of
its squares is that of equal ones.  The head also says whether a rank refuses the call, and whether replicas
have gradients of the same parameters.

More norms, or an order without exact powers, take further reductions.  On the host these follow if nothing is
wrong.  On an accelerator, where reading the head would wait, they follow in any case; if anything is wrong
the norms are NaN, and a later call raises the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core.batch import Norms
from torchclip._core.ranks import limbs, meshes
from torchclip._core.ranks.limbs import Array
from torchclip._core.ranks.meshes import Ranks
from torchclip._core.scalars import on_device

_SLOTS = 4
"""How many norms travel with the head."""
_VERSION = 3
# The words of a head: the number of ranks, the number of the call and its square, how many ranks refuse, the
# sums of these ranks' numbers and of their squares, what is 0 if replicas do not differ, and for each fact how
# many ranks know it.
_RANKS, _CALL, _CALL_SQUARED, _REFUSALS, _WHO, _WHO_SQUARED, _REPLICAS, _FACTS = range(8)
_HEAD = _FACTS + 6


class Kind:
    """The kind of a call.  Ranks that are at calls of different kinds are out of step."""

    CLIP: Final = 1
    MEASURE: Final = 2
    CLIP_EACH: Final = 3
    MEASURE_EACH: Final = 4
    ADAPT: Final = 5
    CONNECT: Final = 6

    NAMES: Final = {
        1: "clipping by the total norm (clip_grad_norm_, or a Clipper's step)",
        2: "measuring the total norm (get_total_norm)",
        3: "clipping each gradient by its norm",
        4: "measuring the norm of each gradient (Clipper.norms)",
        5: "adaptive clipping",
        6: "finding the ranks that `group` connects",
    }


@dataclass
class Call:
    """What all exchanges of a call need to know.

    Attributes:
        kind: of ``Kind``.
        order: the order of the norms.
        facts: of this rank; after an exchange on the host, of all ranks that took part.
        lacking: the replicas' gradients that this rank lacks, in words.
        refused: 1 + the rank that refused its arguments, or found others out of step; 0 if none did.
        error: what to raise after the last exchange.
    """

    kind: int
    order: float
    facts: int = 0
    lacking: str = ""
    refused: int = 0
    error: str | None = None

    def fail(self, error: str) -> None:
        """Tell the ranks of all further exchanges that this call failed."""
        self.error = self.error or error
        self.refused = self.refused or 1 + dist.get_rank()

    def finish(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise RuntimeError(self.error)


class _Verdict(NamedTuple):
    """The sum of all heads on its way from an accelerator.

    Attributes:
        arrived: the event that shows its arrival; None if it is there.
        total: the sum.
        groups: the process groups of the exchange.
        norms: how many norms this rank had.
        call: a copy of the call.
    """

    arrived: Any
    total: Tensor
    groups: Sequence[dist.ProcessGroup]
    norms: int
    call: Call


class _State:
    """What a process group has to remember from one call to the next."""

    def __init__(self) -> None:
        # That its ranks are out of step, which all further calls raise.
        self.error: str | None = None
        # What was wrong with an earlier exchange on an accelerator, which the next call raises.
        self.late: str | None = None
        self.verdicts: list[_Verdict] = []


_states: WeakKeyDictionary[dist.ProcessGroup, _State] = WeakKeyDictionary()
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
    count, p = len(norms), call.order
    if not _may_exchange(groups, call):
        return [math.nan] * count
    sent = _array(norms, device)
    is_exact = p in limbs.EXACT
    first, more = (sent[:_SLOTS], sent[_SLOTS:]) if is_exact else (sent[:0], sent)
    message = _message(_head(count, call, replicas), limbs.words(first, p))
    _reduce(message, dist.ReduceOp.SUM, groups)
    right = _is_right(message[:_HEAD], groups, count, call)
    if right is False:
        return [math.nan] * count
    if is_exact:
        total = message[_HEAD:].reshape(_SLOTS, limbs.WORDS)[: len(first)]
        total = _concatenate(total, _summed(more, p, groups)) if len(more) else total
        joint = limbs.joint(total, p)
    else:
        joint = _joint_by_shares(more, p, groups)
    return joint.tolist() if right is True else torch.where(right, joint, math.nan)


def connected(groups: Sequence[dist.ProcessGroup], call: Call) -> Ranks:
    """The ranks that process groups connect; those of several groups are asked once, and waited for.

    If that fails, the call fails, and there are none.
    """
    if len(groups) == 1:
        return meshes.ranks_of(groups[0])
    known, others = _connected.setdefault(groups[0], {}), tuple(groups[1:])
    if others not in known:
        device = meshes.device_of(groups[0])
        ask = replace(call, kind=Kind.CONNECT, order=0.0)
        agreed = exchange(groups, [float(dist.get_rank())], ask, device)
        _read_verdicts(_state_of(groups[0]), wait=True)
        if math.isnan(agreed[0]):
            late = _state_of(groups[0])
            call.fail(ask.error or late.late or "")
            late.late = None
            return frozenset()
        call.error = call.error or ask.error
        known[others] = _connected_by(groups, device)
    return known[others]


def _connected_by(groups: Sequence[dist.ProcessGroup], device: str) -> Ranks:
    here = np.bincount([dist.get_rank()], minlength=dist.get_world_size())
    times = _reduce(_like(_array([], device), here), dist.ReduceOp.SUM, groups).tolist()
    if max(times) > 1:
        raise ValueError(
            "the process groups in `group` must cross each other, so that any two ranks are connected in "
            f"only one way; rank {dist.get_rank()} is connected to some ranks several times"
        )
    return None if min(times) else frozenset(np.flatnonzero(times).tolist())


def raise_pending() -> None:
    """Raise the error of an earlier exchange on an accelerator, which could not be read at the time.

    Call it where a norm from an exchange is read: it waits for the exchange.
    """
    for state in list(_states.values()):
        _read_verdicts(state, wait=True)
        error, state.late = state.late, None
        if error is not None:
            raise RuntimeError(error)


# Heads


def _head(count: int, call: Call, replicas: int) -> Any:
    number, who = _number(count, call), call.refused
    facts = [call.facts >> i & 1 for i in range(_HEAD - _FACTS)]
    return np.array([1, number, number**2, who > 0, who, who**2, replicas, *facts])


def _number(count: int, call: Call) -> int:
    """A number of 20 bits that stands for a call: sums of its square over 2²³ ranks stay in range."""
    return crc32(repr((_VERSION, call.kind, call.order + 0.0, count)).encode()) >> 12


def _is_right(total: Array, groups: Sequence[dist.ProcessGroup], count: int, call: Call) -> bool | Tensor:
    """Whether nothing is wrong, by the sum of all heads; a tensor where the host does not wait for it."""
    if not isinstance(total, Tensor):
        return _learn(total.tolist(), groups, count, call)
    _state_of(groups[0]).verdicts.append(_Verdict(*_to_host(total), groups, count, replace(call)))
    number = _number(count, call)
    expected = total[_RANKS] * _like(total, np.array([number, number**2]))
    is_same: Tensor = (total[_CALL : _CALL_SQUARED + 1] == expected).all()
    return is_same & (total[_REFUSALS] == 0) & (total[_REPLICAS] == 0)


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
        for group in groups:
            _state_of(group).error = error
        return False
    if total[_REPLICAS]:
        call.fail(_different_replicas(call))
        return False
    call.facts = sum((known > 0) << i for i, known in enumerate(total[_FACTS:]))
    return True


def _refusal(who: str) -> str:
    return (
        f"{who} refused its gradients or an argument, or found other ranks out of step, as its own error says; "
        "so this call was called off on all ranks that wait for it, and no gradient was changed"
    )


def _out_of_step(ranks: int, count: int, call: Call) -> str:
    return (
        f"ranks are out of step: of {ranks} ranks, this one is {Kind.NAMES[call.kind]}, with {count} norms of "
        f"order {call.order}, and another one is not, or has another version of torchclip; its own error says "
        "what it is at. All ranks must make the same calls with the same parameters in the same order. They "
        "cannot be in step again, so each further call on this process group raises this error; make the group "
        "anew, as by starting again from a checkpoint"
    )


def _different_replicas(call: Call) -> str:
    here = (
        f"this rank lacks that of {call.lacking}" if call.lacking else "others lack some that this rank has"
    )
    return (
        f"ranks with replicas of the same parameters have gradients of different ones: {here}. Set the "
        "gradients that are missing to zeros, or those of the other replicas to None; no gradient was changed, "
        "unless on an accelerator, where the norm was NaN"
    )


# The state of process groups


def _state_of(group: dist.ProcessGroup) -> _State:
    return _states.setdefault(group, _State())


def _may_exchange(groups: Sequence[dist.ProcessGroup], call: Call) -> bool:
    """Whether no earlier exchange has found the ranks out of step; else the call fails."""
    for group in groups:
        state = _state_of(group)
        _read_verdicts(state, wait=False)
        # Other ranks may not have read this error yet, so this rank still takes part, and then raises it.
        call.error, state.late = call.error or state.late, None
    errors = [error for group in groups if (error := _state_of(group).error) is not None]
    if errors:
        call.fail(errors[0])
    return not errors


def _to_host(words: Tensor) -> tuple[Any, Tensor]:
    """A copy in host memory, and the event that shows its arrival."""
    if words.is_cpu:  # within a transform, where nothing can be read
        return None, words
    there = torch.empty(words.shape, dtype=words.dtype, pin_memory=True).copy_(words, non_blocking=True)
    arrived = torch.get_device_module(words.device).Event()
    arrived.record()
    return arrived, there


def _read_verdicts(state: _State, wait: bool) -> None:
    """Take note of what has arrived from the accelerator."""
    while state.verdicts:
        arrived, total, groups, count, call = state.verdicts[0]
        if arrived is not None and not arrived.query():
            if not wait:
                return
            arrived.synchronize()
        del state.verdicts[0]
        call.error = None
        _learn(total.tolist(), groups, count, call)
        state.late = state.late or call.error


# Arrays


def _array(norms: Norms, device: str) -> Array:
    """Norms to compute with: an array if they can be read, else a tensor on the groups' device."""
    if device == "cpu" and torch._C._functorch.maybe_current_level() is None:
        if isinstance(norms, Tensor):
            return norms.detach().to("cpu", torch.float64).numpy()
        return np.array(norms, dtype=np.float64)
    return on_device(norms, device)


def _like(array: Array, numbers: Any) -> Array:
    """A NumPy array of integers as an array of the same kind as another one."""
    if not isinstance(array, Tensor):
        return numbers
    return torch.from_numpy(numbers).to(array.device, non_blocking=True)


def _concatenate(*arrays: Array) -> Array:
    return torch.cat(arrays) if isinstance(arrays[0], Tensor) else np.concatenate(arrays)


def _message(head: Any, words: Array) -> Array:
    """The first message of an exchange, of the same size for any number of norms."""
    rest = np.zeros((_SLOTS - len(words)) * limbs.WORDS, np.int64)
    return _concatenate(_like(words, head), words.reshape(-1), _like(words, rest))


def _reduce(array: Array, op: Any, groups: Sequence[dist.ProcessGroup]) -> Array:
    """The sum or the maximum of all ranks' arrays, in place of this rank's."""
    for group in groups:
        dist.all_reduce(array if isinstance(array, Tensor) else torch.from_numpy(array), op, group=group)
    return array


def _summed(norms: Array, p: float, groups: Sequence[dist.ProcessGroup]) -> Array:
    return _reduce(limbs.words(norms, p), dist.ReduceOp.SUM, groups)


def _joint_by_shares(norms: Array, p: float, groups: Sequence[dist.ProcessGroup]) -> Array:
    """The joint norms of an order whose powers may leave every range: first the leading ones."""
    largest = _reduce(limbs.keys(norms, p), dist.ReduceOp.MAX, groups)
    leading = limbs.leading(largest, p)
    if math.isinf(p):
        return leading
    total = _summed(limbs.shares(norms, leading, p), 1.0, groups)
    return limbs.from_shares(leading, limbs.joint(total, 1.0), p)
