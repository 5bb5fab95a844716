"""Rounds whose steps are taken during a backward pass: what they can do, when they end, and their record."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import islice
from operator import and_
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.variable import ImperativeEngine  # type: ignore[attr-defined]
from torch.optim import Optimizer

from torchclip._core import gather, joint_norms, scalars
from torchclip._core.batch import Norm
from torchclip._core.ranks import meshes
from torchclip.clipper.clipping import Loss, Row
from torchclip.clipper.optimizers import groups_of, parameters_of
from torchclip.clipper.rules import ratio
from torchclip.clipper.scope import own_max_norms
from torchclip.clipper.settings import Settings

_BACKWARD = {torch.autograd.backward.__code__, torch.autograd.grad.__code__}


def is_running() -> bool:
    """Whether the caller is called from within a backward pass."""
    return torch._C._current_graph_task_id() != -1


def refuse(settings: Settings, optimizers: Sequence[Optimizer]) -> bool:
    """Raise an error for what is impossible while other gradients do not exist yet.

    Returns:
        Whether gradients are sharded.
    """
    several = settings.several
    is_sharded = meshes.any_dtensor(parameters_of(*optimizers))
    if is_sharded and not (several and _takes_no_norm(settings, optimizers)):
        raise RuntimeError(
            "the gradients of a step that is taken during the backward pass are sharded; their norm "
            "takes other ranks, which may be elsewhere in theirs. Use `Value`, which takes no norm, or "
            "`max_norm=inf`, with nonfinite='propagate', several optimizers and no `layers_every`; or "
            "call optimizer.step() after backward()"
        )
    what = _needs_all(settings, optimizers) if several else None
    if what is not None:
        raise RuntimeError(
            f"an optimizer steps during the backward pass, but {what} needs the gradients of all "
            "optimizers, which are not there yet. Use `scope='group'` or 'parameter' without "
            "`skip_above`, or call optimizer.step() after backward()"
        )
    return is_sharded


def _takes_no_norm(settings: Settings, optimizers: Sequence[Optimizer]) -> bool:
    """Whether gradients are clipped without a norm of them, which only the record has then."""
    limits = {*own_max_norms(groups_of(optimizers), {}).values()}
    if settings.nonfinite != "propagate" or settings.spikes is not None or limits - {None, math.inf}:
        return False
    if settings.order <= 0 or settings.layers_every:
        return False
    if settings.rule is not None:
        return getattr(settings.rule, "by_element", False)
    return None not in limits or settings.bank.number == math.inf


def _needs_all(settings: Settings, optimizers: Sequence[Optimizer]) -> str | None:
    """The option that needs the gradients of all optimizers before any can step; None if there is none."""
    if settings.spikes is not None:
        return "`skip_above`"
    if settings.groups is not None:
        return "`group`"
    if settings.joins_norms:
        return "the warm-up of AdaGC, with a finite `max_norm`,"
    together = any("max_norm" not in group.values for group in groups_of(optimizers))
    if settings.scope == "global" and settings.bank.number != math.inf and together:
        return "one threshold for all of them (`scope='global'`)"
    return None


class BackwardRound:
    """A round of several optimizers that step during a backward pass.

    Each of them is clipped by itself, and all are recorded together when the pass is over.  Sharded gradients
    are clipped without other ranks; these join the norms then.

    Args:
        settings: what the user asks for.
        is_sharded: whether any gradients are sharded.
    """

    def __init__(self, settings: Settings, is_sharded: bool) -> None:
        self._settings, self.is_sharded = settings, is_sharded
        # The backward pass, and those of checkpoints within it.  By the number of the pass, the function that
        # torch calls at its end and keeps until then; None once it was called.
        self._ends: dict[int, ref[Callable[[], object]] | None] = {}
        # Sharded gradients' norms before and after clipping, and their joint norm and factor at the end.
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._joint: tuple[Norm, Norm] | None = None

    def follow(self, close: Callable[[], object]) -> None:
        """Call a function when the running pass, and every pass around it, is over."""
        number = torch._C._current_graph_task_id()
        if number not in self._ends:
            end = partial(self._end_of, number, close)
            self._ends[number] = ref(end)
            ImperativeEngine().queue_callback(end)

    def is_over(self) -> bool:
        """Whether the running pass is another one, because those followed have ended in an exception.

        A pass that begins later has a higher number.
        """
        number = torch._C._current_graph_task_id()
        if number in self._ends or number < max(self._ends):
            return False
        have_failed = any(end is not None and end() is None for end in self._ends.values())
        return have_failed or not _is_within_another()

    def stop(self) -> None:
        """Follow the passes no longer."""
        self._ends = {}

    def _end_of(self, number: int, close: Callable[[], object]) -> None:
        if number not in self._ends:
            return
        self._ends[number] = None
        if not _is_within_another():
            if self.is_sharded:  # now other ranks may be asked
                before, after = (
                    gather.tensors(norms).norm(self._settings.order) if norms else 0.0
                    for norms in (self._before, self._after)
                )
                self._joint = before, ratio(after, before)
            close()

    def clip_sharded(self, optimizer: Optimizer, step: int, loss: Loss) -> Row:
        """Clip the gradients of an optimizer by a rule that takes no norm, if there is one."""
        grads = gather.distinct_gradients(parameters_of(optimizer))
        if any(map(meshes.is_partial, grads)):
            raise RuntimeError(
                "the gradients of a step that is taken during the backward pass are pending a reduction over "
                "ranks. Call optimizer.step() after backward()"
            )
        self._before += _held_norms(grads, self._settings.order)
        if self._settings.rule is not None:
            groups = [group for group in optimizer.param_groups if "max_norm" not in group]
            self._settings.rule.clip_([p for group in groups for p in group["params"]])
        self._after += _held_norms(grads, self._settings.order)
        return Row(step, 0.0, math.inf, 1.0, False, loss)

    def joined(self, rows: Sequence[Row]) -> list[Row]:
        """One record for all steps; none if other ranks were not asked, as the pass has failed."""
        if not rows or (self.is_sharded and self._joint is None):
            return []
        order = self._settings.order
        losses = [row.loss for row in rows if row.loss is not None]
        total_norm = joint_norms.join([row.total_norm for row in rows], order)
        clip_coef = joint_norms.join([row.clip_coef for row in rows], -math.inf)
        if self._joint is not None:
            total_norm, clip_coef = self._joint
        elif self._settings.rule is not None:
            after = [row.total_norm * row.clip_coef for row in rows]
            clip_coef = ratio(joint_norms.join(after, order), total_norm)
        max_norm = joint_norms.join([row.max_norm for row in rows], -math.inf)
        skipped = reduce(and_, (row.skipped for row in rows))
        return [Row(rows[0].step, total_norm, max_norm, clip_coef, skipped, losses[0] if losses else None)]


def _is_within_another() -> bool:
    """Whether the running pass is that of a checkpoint, within another pass."""
    passes = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code in _BACKWARD)
    return len(list(islice(passes, 2))) > 1


def _held_norms(grads: Sequence[Tensor], order: float) -> list[Tensor]:
    """A tensor for each gradient, which lies as it does and has one element on each rank, the norm there."""
    found = []
    for grad, part in zip(grads, meshes.locals_of(grads), strict=True):
        norm = scalars.present(gather.tensors([part]).norm(order))
        held = torch.as_tensor(norm, dtype=torch.float64, device=part.device).reshape(1)
        if meshes.is_dtensor(grad):
            from torch.distributed.tensor import DTensor, Replicate, Shard

            places = [Replicate() if each.is_replicate() else Shard(0) for each in grad.placements]
            held = DTensor.from_local(held, grad.device_mesh, places, run_check=False)
        found.append(held)
    return found
