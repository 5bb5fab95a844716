"""The round that is open: what was done in it, and what will be recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import and_
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchclip._core.batch import Norms
from torchclip.clipper.settings import Settings
from torchclip.clipper.step import Step
from torchclip.clipper.updates import Moved, WeightsBefore

Row: TypeAlias = tuple[Any, ...]
"""The arguments of ``History.append``."""


class OpenRound:
    """The round that is open, and what will be recorded of it.

    It has no ``__init__``, as a step of a training has no time for one.

    Attributes:
        opener: the optimizer that opened it.
        number: its number.
        settings: the Clipper's.
        is_local: whether it must be clipped without other ranks.
        rows: a row for each clipping: for each call of a closure.
        layers: names and norms of single parameters.
        before: by the index of an optimizer that is stepping: its weights before that, if they are recorded.
        moved: how far the optimizers have moved their weights.
        skipped: whether the round is skipped.
        stepped: whether any optimizer has stepped in it.
        by_scaler: with several optimizers: whether a GradScaler skips the step of each that has begun one.
    """

    opener: int
    number: int
    settings: Settings
    is_local = False
    rows: list[Row]
    layers: tuple[list[str], Norms] | None = None
    before: dict[int, WeightsBefore] | None = None
    moved: list[Moved]
    skipped: bool | Tensor = False
    stepped = False
    by_scaler: Mapping[int, bool | Tensor] = MappingProxyType({})

    def rows_after(self, steps: Sequence[Step]) -> list[Row]:
        """What is recorded, given whether a GradScaler has skipped all steps that were taken."""
        stepped = [i for i, step in enumerate(steps) if step.stepped and i in self.by_scaler]
        skipped = reduce(and_, [self.by_scaler[i] for i in stepped]) if stepped else False
        *rows, (number, norm, max_norm, clip_coef, is_skipped, *rest) = self.rows
        if skipped is True:
            max_norm, clip_coef, is_skipped = math.inf, 1.0, True
        elif isinstance(skipped, Tensor):
            is_skipped = torch.as_tensor(is_skipped, device=skipped.device) | skipped
        return [*rows, (number, norm, max_norm, clip_coef, is_skipped, *rest)]
