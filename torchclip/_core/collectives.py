"""What ranks send each other: norms, and data that shows whether all of them are at the same call.

Ranks first exchange a head of fixed size.  It has the number of the exchange, counted in each process group,
the kind of the call, the order and the number of the norms, and the facts on which decisions depend.  Up to
four norms travel with the head; the others follow.

Few ranks gather each other's messages.  Among many ranks, where a gather would grow with their number, there
are two reductions: a maximum and a sum.  Either way the joint norms are sums of integers (``joint_norms``),
with the same bits on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core import joint_norms, messages
from torchclip._core.batch import Norms
from torchclip._core.messages import Array
from torchclip._core.scalars import ABSENT, on_device

_FEW = 64
"""Up to this many norms are joined faster one by one than as arrays."""
_SLOTS = 4
"""How many norms, and how many marks, fit into the head."""
DIFFERS: Final = -1
"""The mark for a difference between ranks."""

_VERSION = 2
_FACTS = 6
# The words of a head.  Those before _REFUSED must be equal on all ranks.
_NUMBER, _KIND, _ORDER, _COUNT, _MARKS = range(5)
_REFUSED = _MARKS + _SLOTS
_HEAD = _REFUSED + 1 + _FACTS

_DIFFERENT_COPIES = (
    "ranks with copies of the same parameters have gradients for different ones of them, which is found out "
    "on an accelerator only after the exchange, so that the norm was NaN; have zeros in place of those "
    "that a rank lacks"
)


class Kind:
    """The kind of a call.  Ranks that are at calls of different kinds are out of step."""

    CLIP: Final = 1
    MEASURE: Final = 2
    CLIP_EACH: Final = 3
    MEASURE_EACH: Final = 4
    ADAPT: Final = 5
    COMPARE: Final = 6
    CONNECT: Final = 7

    NAMES: Final = {
        1: "clipping by the total norm (clip_grad_norm_, or a Clipper's step)",
        2: "measuring the total norm (get_total_norm)",
        3: "clipping each gradient by its norm",
        4: "measuring the norm of each gradient (Clipper.norms)",
        5: "adaptive clipping",
        6: "comparing copies of gradients",
        7: "finding the ranks that `group` connects",
    }


@dataclass
class Call:
    """What all exchanges of a call need to know.

    Attributes:
        kind: of ``Kind``.
        order: the order of the norms.
        facts: of this rank; after an exchange, of all ranks that took part.
        refused: 1 + the rank that refused its arguments, or found others out of step; 0 if none did.
        error: what to raise after the last exchange.
        sent: what each rank sent in the last exchange, as rows, if it was gathered together with the heads.
    """

    kind: int
    order: float
    facts: int = 0
    refused: int = 0
    error: str | None = None
    sent: Any = None

    def fail(self, error: str) -> None:
        """Tell the ranks of all further exchanges that this call failed."""
        self.error = self.error or error
        self.refused = self.refused or 1 + dist.get_rank()

    def finish(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise RuntimeError(self.error)


class _State:
    """The state of a process group: how many exchanges it had, and whether its ranks are out of step."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.number = 0
        self.error: str | None = None
        # What was wrong with an earlier exchange on an accelerator, to be raised by the next call.
        self.refusal: str | None = None
        # Verdicts on their way from an accelerator: the events that show their arrival, and the words.
        self.verdicts: list[tuple[Any, Tensor]] = []


_states: WeakKeyDictionary[dist.ProcessGroup, _State] = WeakKeyDictionary()


class _Heads(NamedTuple):
    """The heads of all ranks, reduced, and the norms that travelled along.

    Attributes:
        high: the largest value of each word.
        low: the smallest value, of the words that must be equal.
        norms: of each rank, as rows; among many ranks, the leading ones.
    """

    high: Array
    low: Array
    norms: Array


def exchange(
    group: dist.ProcessGroup, norms: Norms, marks: Sequence[int], call: Call, device: str
) -> tuple[Norms, list[int]]:
    """Join each norm with the norms that the other ranks of a group have in its place.

    Args:
        group: the process group.
        norms: this rank's norms, or ``ABSENT``.
        marks: up to ``_SLOTS`` numbers, at least 0 or ``DIFFERS``.
        call: the call; it receives what other ranks know.
        device: the type of the device that the group's collectives work on.

    Returns:
        The joint norms, the same bits on every rank, NaN if anything was wrong; a tensor on an accelerator.
        And the marks: ``DIFFERS`` where they differed between ranks, which is not known on an accelerator,
        and 0 if anything was wrong.
    """
    state = _state_of(group, call)
    count = len(norms)
    failed = [math.nan] * count, [0] * len(marks)
    # Other ranks may not have read this error yet, so this rank still takes part, and then raises it.
    refusal, state.refusal = state.refusal, None
    call.error = call.error or refusal
    if state.error is not None:
        return failed
    head = _head(state, count, marks, call)
    sent = _array(_padded(norms), device)
    with np.errstate(all="ignore"):
        heads = _exchange_heads(group, head, sent[:_SLOTS], call)
        if isinstance(heads.high, Tensor):
            right = _send_verdict(state, heads)
            return torch.where(right, _join(group, sent, count, heads, call.order), math.nan), list(marks)
        high, low = heads.high.tolist(), heads.low.tolist()
        if not _learn(state, high, low, call):
            return failed
        joint = _join(group, sent, count, heads, call.order).tolist()
    call.sent = None if messages.are_many(group, sent) or count > _SLOTS else heads.norms[:, :count]
    words = zip(marks, high[_MARKS:], low[_MARKS:])  # noqa: B905 - of as many as there are marks
    return joint, [mark if most == least else DIFFERS for mark, most, least in words]


def gather_rows(group: dist.ProcessGroup, numbers: Array, call: Call, device: str) -> Any:
    """Every rank's numbers as the rows of an array, once they have arrived; None if the call failed."""
    state = _state_of(group, call)
    if state.error is not None:
        return None
    heads = _exchange_heads(group, _head(state, len(numbers), (), call), _array(_padded([]), device), call)
    if not _learn(state, heads.high.tolist(), heads.low.tolist(), call):
        return None
    rows = messages.gather(group, messages.like(heads.high, numbers))
    return rows.cpu().numpy() if isinstance(rows, Tensor) else rows


# Heads


def _head(state: _State, count: int, marks: Sequence[int], call: Call) -> list[int]:
    number, state.number = state.number, state.number + 1
    order = int(np.float64(call.order + 0.0).view(np.int64))
    padding = [0] * (_SLOTS - len(marks))
    facts = [call.facts >> i & 1 for i in range(_FACTS)]
    return [number, 100 * _VERSION + call.kind, order, count, *marks, *padding, call.refused, *facts]


def _exchange_heads(group: dist.ProcessGroup, head: list[int], riding: Array, call: Call) -> _Heads:
    words = messages.like(riding, np.array(head))
    if not messages.are_many(group, riding):
        rows = messages.gather(group, messages.concatenate(words, riding.view(words.dtype)))
        high = joint_norms.largest(rows[:, :_HEAD])
        low = -joint_norms.largest(-rows[:, :_REFUSED])
        return _Heads(high, low, rows[:, _HEAD:].view(riding.dtype))
    message = messages.concatenate(words, -words[:_REFUSED], joint_norms.keys(riding, call.order))
    reduced = messages.reduced(group, message, dist.ReduceOp.MAX)
    leading = joint_norms.leading(reduced[_HEAD + _REFUSED :], call.order)
    return _Heads(reduced[:_HEAD], -reduced[_HEAD : _HEAD + _REFUSED], leading)


def _learn(state: _State, high: list[int], low: list[int], call: Call) -> bool:
    """Take note of what all ranks of a group know now: their facts, or an error, and then False."""
    refused = high[_REFUSED]
    # A rank that refused an argument may not know more about its call than this.
    known = _KIND if refused else _COUNT
    if high[: known + 1] != low[: known + 1]:
        state.error = _out_of_step(state.ranks, high, low)
        call.fail(state.error)
        return False
    if refused:
        call.refused = refused
        call.fail(_refusal(refused - 1))
        return False
    call.facts = sum(fact << i for i, fact in enumerate(high[_REFUSED + 1 :]))
    return True


def _out_of_step(ranks: int, high: list[int], low: list[int]) -> str:
    at = f"at exchange {low[_NUMBER]} of the process group of {ranks} ranks"
    if high[_NUMBER] != low[_NUMBER]:
        which = (
            f"some are at exchange {low[_NUMBER]} and others at exchange {high[_NUMBER]} of the process "
            f"group of {ranks} ranks"
        )
    elif high[_KIND] // 100 != low[_KIND] // 100:
        which = "they have different versions of torchclip"
    elif high[_KIND] != low[_KIND]:
        names = [Kind.NAMES[words[_KIND] % 100] for words in (low, high)]
        which = f"{at} some are {names[0]} and others {names[1]}"
    elif high[_ORDER] != low[_ORDER]:
        orders = [float(np.int64(words[_ORDER]).view(np.float64)) for words in (low, high)]
        which = f"{at} some take norms of order {orders[0]} and others of order {orders[1]}"
    else:
        which = (
            f"{at} some have {low[_COUNT]} norms and others {high[_COUNT]}, as of parameters or their groups"
        )
    return (
        f"ranks are out of step: {which}. All ranks must make the same calls with the same parameters in the "
        "same order. They cannot be in step again, so each further call on this process group raises this "
        "error; make the group anew, as by starting again from a checkpoint"
    )


def _refusal(rank: int) -> str:
    return (
        f"rank {rank} refused its gradients or an argument, or found other ranks out of step, as its own "
        "error says; so this call was called off on all ranks that wait for it, and no gradient was changed"
    )


# On an accelerator


def _send_verdict(state: _State, heads: _Heads) -> Tensor:
    """Whether nothing is wrong, as a tensor; the details are on their way to the host."""
    words = torch.cat([heads.high, heads.low])
    if words.is_cpu:  # within a transform, where nothing can be read
        arrived, there = None, words
    else:
        there = torch.empty(words.shape, dtype=words.dtype, pin_memory=True).copy_(words, non_blocking=True)
        arrived = torch.get_device_module(words.device).Event()
        arrived.record()
    state.verdicts.append((arrived, there))
    right: Tensor = (heads.high[:_REFUSED] == heads.low).all() & (heads.high[_REFUSED] == 0)
    return right


def raise_pending() -> None:
    """Raise the error of an earlier exchange on an accelerator, which could not be read at the time.

    Call it where a norm from an exchange is read: it waits for the exchange.
    """
    for state in list(_states.values()):
        _read_verdicts(state, wait=True)
        error, state.refusal = state.refusal, None
        if error is not None:
            raise RuntimeError(error)


def _read_verdicts(state: _State, wait: bool) -> None:
    """Record what has arrived from the accelerator."""
    while state.verdicts:
        arrived, words = state.verdicts[0]
        if arrived is not None and not arrived.query():
            if not wait:
                return
            arrived.synchronize()
        del state.verdicts[0]
        high, low = words[:_HEAD].tolist(), words[_HEAD:].tolist()
        call = Call(0, 0.0)
        _learn(state, high, low, call)
        if call.error is None and high[_MARKS:_REFUSED] != low[_MARKS:_REFUSED]:
            call.fail(_DIFFERENT_COPIES)
        state.refusal = state.refusal or call.error


# Arithmetic


def _join(group: dist.ProcessGroup, sent: Array, count: int, heads: _Heads, p: float) -> Array:
    """The joint norms, once the heads are known."""
    if not messages.are_many(group, sent):
        rows = heads.norms[:, :count] if count <= _SLOTS else messages.gather(group, sent)
        if isinstance(rows, Tensor) or rows.size > _FEW or p not in (1, 2):
            return joint_norms.join_columns(rows, p)
        return np.array([joint_norms.join_numbers(column, p) for column in rows.T.tolist()])
    leading = heads.norms
    if not isinstance(sent, Tensor):  # fewer messages of gloo's; a tensor's ranks may not agree on the count
        sent, leading = sent[:count], leading[:count]
    if count > _SLOTS:
        largest = messages.reduced(group, joint_norms.keys(sent, p), dist.ReduceOp.MAX)
        leading = joint_norms.leading(largest, p)
    # Tensors are summed in any case: a rank that refused its arguments may not know the order.
    if math.isinf(p) and not isinstance(leading, Tensor):
        return leading[:count]
    limbs = messages.reduced(
        group, messages.concatenate(*joint_norms.terms(sent, leading, p)), dist.ReduceOp.SUM
    )
    if math.isinf(p):
        return leading[:count]
    return joint_norms.root(leading, limbs[: len(sent)], limbs[len(sent) :], p)[:count]


def _state_of(group: dist.ProcessGroup, call: Call) -> _State:
    """The state of a group; if it has an error, the call fails."""
    state = _states.get(group)
    if state is None:
        state = _states[group] = _State(group.size())
    _read_verdicts(state, wait=False)
    if state.error is not None:
        call.fail(state.error)
    return state


def _array(norms: Norms, device: str) -> Array:
    """Norms to compute with: an array if they can be read, else a tensor on the group's device."""
    if device == "cpu" and torch._C._functorch.maybe_current_level() is None:
        if isinstance(norms, Tensor):
            return norms.detach().to("cpu", torch.float64).numpy()
        return np.array(norms, dtype=np.float64)
    return on_device(norms, device)


def _padded(norms: Norms) -> Norms:
    """At least as many norms as fit into the head."""
    lacking = max(0, _SLOTS - len(norms))
    if isinstance(norms, Tensor):
        return torch.nn.functional.pad(norms, (0, lacking), value=ABSENT)
    return [*norms, *[ABSENT] * lacking]
