"""The round that is open: what was done in it, and what will be recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import and_
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchclip._core.batch import Norms
from torchclip.clipper import fused
from torchclip.clipper.nonfinite import hide_gradients, is_skipped_by_scaler
from torchclip.clipper.sets import Gradients
from torchclip.clipper.settings import Settings
from torchclip.clipper.step import Step
from torchclip.clipper.updates import Moved, WeightsBefore
from torchclip.history.records import Record, as_record, with_layers

Row: TypeAlias = tuple[Any, ...]
"""The arguments of ``History.append``."""


class OpenRound:
    """The round that is open, and what will be recorded of it.

    It has no ``__init__``, as a step of a training has no time for one.

    Attributes:
        opener: the step that opened it.
        number: its number.
        settings: the Clipper's.
        is_local: whether it must be clipped without other ranks.
        rows: a row for each clipping: for each call of a closure.
        layers: names and norms of single parameters.
        before: the weights before each step, if its updates are recorded.
        moved: how far the optimizers have moved their weights.
        skipped: whether the round is skipped.
        stepped: whether any optimizer has stepped in it.
        by_scaler: of several optimizers, those steps that a GradScaler skips, or may skip.
    """

    opener: Step
    number: int
    settings: Settings
    is_local = False
    rows: list[Row]
    layers: tuple[list[str], Norms] | None = None
    before: Mapping[Step, WeightsBefore] = MappingProxyType({})
    moved: Sequence[Moved] = ()
    skipped: bool | Tensor = False
    stepped = False
    by_scaler: Mapping[Step, bool | Tensor] = MappingProxyType({})

    def rows_after(self, steps: Sequence[Step]) -> list[Row]:
        """What is recorded, given whether a GradScaler has skipped all steps that were taken."""
        found = [self.by_scaler.get(step, False) for step in steps if step.stepped]
        skipped = reduce(and_, found) if found else False
        *rows, (number, norm, max_norm, clip_coef, is_skipped, *rest) = self.rows
        if skipped is True:
            max_norm, clip_coef, is_skipped = math.inf, 1.0, True
        elif isinstance(skipped, Tensor):
            is_skipped = torch.as_tensor(is_skipped, device=skipped.device) | skipped
        return [*rows, (number, norm, max_norm, clip_coef, is_skipped, *rest)]

    def note_scaler(self, step: Step) -> None:
        """Take note of whether a GradScaler skips the step of one of several optimizers."""
        skipped = is_skipped_by_scaler(step.optimizer)
        if skipped is not False or step in self.by_scaler:  # a step of it may have failed before
            self.by_scaler = {**self.by_scaler, step: skipped}

    def copy_weights(self, step: Step) -> None:
        """Copy the weights that a step with layers will change, if its updates are recorded."""
        is_recorded = self.settings.updates and self.skipped is not True
        if is_recorded and step not in self.before:  # else the closure was called again
            self.before = {**self.before, step: WeightsBefore(step)}

    def tell(self, on_clip: Callable[[Record], object], row: Row, step: Step, gradients: Gradients) -> None:
        """Tell the user's function of a clipping; if it raises, the gradients are clipped all the same."""
        record = as_record(row)
        try:
            on_clip(record if self.layers is None else with_layers(record, *self.layers))
        except BaseException:
            if step.override is not None and step.override.divides:
                gradients.scale_(self.skipped)  # which was left to the step
            raise

    def skip(self, step: Step) -> None:
        """Keep a step from changing anything if the Clipper skips its round, and not a GradScaler alone."""
        if self.skipped is True:
            hide_gradients(step)
        elif self.skipped is not False:
            # Hiding the gradients would wait for the device.  A GradScaler may have its own reason to skip.
            fused.override(step).skip_where(self.skipped | is_skipped_by_scaler(step.optimizer))
