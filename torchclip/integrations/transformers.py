"""A Clipper on the optimizer of a Hugging Face Trainer."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip._core.extras import installing
from torchclip.clip_grad.norm import get_total_norm
from torchclip.clipper.clipper import Clipper
from torchclip.clipper.optimizers import parameters_of
from torchclip.history.records import Record
from torchclip.integrations.loggers import DictLogger, Scalars
from torchclip.integrations.tensorboard import ScalarLogger
from torchclip.thresholds.base import MaxNorm, Rule

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torchclip.integrations.transformers needs transformers and accelerate; install them with: "
        f"{installing('transformers')}"
    ) from error

__all__ = ["ClipperCallback"]


class ClipperCallback(TrainerCallback, ExportableState):
    """Clips in every step of the Trainer's optimizer, in place of the Trainer's own clipping:

        args = TrainingArguments(max_grad_norm=0.0, ...)
        trainer = Trainer(model, args, callbacks=[ClipperCallback(max_norm=1.0)], ...)

    The clipper uses the model's names for its parameters, and its records include the loss.  Checkpoints
    store its state in ``trainer_state.json``, and ``resume_from_checkpoint`` restores it.

    ``trainer.state.log_history``, and the logs that later callbacks receive, such as the printed ones, have
    ``clip/total_norm``, ``clip/clipped_norm``, ``clip/max_norm`` and ``clip/clipped_share`` of the latest
    step, and with ``layers_every`` the latest norms of single parameters.  Callbacks of ``report_to`` run
    before those of the user: for them pass ``on_clip``, with a class of ``torchclip.integrations.loggers`` or
    ``torchclip.integrations.tensorboard``.  The Trainer's own ``grad_norm`` is the norm that the clipper
    measures: the Trainer does not measure the gradients itself.

    This does not work with DeepSpeed and FSDP1, which hide the gradients; use ``max_grad_norm`` there.

    Args:
        max_norm: the threshold: whatever ``torchclip.Clipper`` takes as its ``max_norm``.
        on_clip: called with the record of each step.
        **options: the other arguments of ``torchclip.Clipper``, such as ``nonfinite``, ``skip_above``,
            ``skip_loss_above``, ``layers_every`` and ``updates``; not ``model``, which the callback passes.

    Raises:
        TypeError: for an argument that a ``Clipper`` does not have.

    Attributes:
        clipper (Clipper | None): the clipper, from the start of training; its history can be read afterwards.
    """

    def __init__(
        self,
        max_norm: MaxNorm | Rule,
        *,
        on_clip: Callable[[Record], object] | None = None,
        **options: Any,
    ) -> None:
        # Raises an error for options that a Clipper does not have, before any training begins.
        inspect.signature(Clipper).bind(None, max_norm, on_clip=None, model=None, **options)
        self._max_norm, self._options = max_norm, options
        self._on_clip = on_clip
        self._scalars = Scalars()
        self._latest: dict[str, float] = {}
        self._grad_norm = torch.empty(())
        self._accelerator: Any = None
        self.clipper: Clipper | None = None

    def on_init_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Refuse an option that would replace this callback.

        Raises:
            ValueError: if ``restore_callback_states_from_checkpoint`` is set.
        """
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "TrainingArguments(restore_callback_states_from_checkpoint=True) would put a new "
                "ClipperCallback in place of this one; do not pass it: its state is restored anyway"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the clipper on the optimizer, and load its state if training resumes from a checkpoint.

        Raises:
            ValueError: if the Trainer clips too.
        """
        if args.max_grad_norm:
            raise ValueError(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}), 1.0 by default, would clip before "
                "ClipperCallback does; pass max_grad_norm=0.0"
            )
        self.on_train_end()  # an exception may have ended the training before
        trainer = _calling_trainer()
        # Its DistributedDataParallel, if there is one, shows which ranks have a mean loss.
        model = kwargs["model"] if trainer is None else trainer.model_wrapped
        self.clipper = Clipper(
            _unwrapped(kwargs["optimizer"]), self._max_norm, on_clip=self._note, model=model, **self._options
        )
        # A checkpoint from before this callback has no entry, but the Trainer needs one when it saves.
        entries: Any = state.stateful_callbacks
        saved = entries.setdefault(type(self).__name__, self.state())["attributes"]["clipper"]
        self._scalars, self._latest = Scalars(), {}
        if state.global_step > 0 and saved is not None:
            self.clipper.load_state_dict(saved)
            self._scalars.resume(self.clipper.history)
            if isinstance(self._on_clip, (DictLogger, ScalarLogger)):
                self._on_clip.resume(self.clipper.history)
        if trainer is not None:
            self._measure_for(trainer)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the numbers of the latest step."""
        if "loss" in kwargs["logs"]:
            kwargs["logs"].update(self._latest)
            state.log_history[-1].update(self._latest)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Remove the clipper."""
        if self.clipper is not None:
            self.clipper.detach()
        if self._accelerator is not None:
            vars(self._accelerator).pop("clip_grad_norm_", None)
            vars(self._accelerator).pop("backward", None)
            self._accelerator = None

    def state(self) -> dict[str, Any]:
        """The clipper's state, for the checkpoint."""
        return {"args": {}, "attributes": {"clipper": self.clipper and self.clipper.state_dict()}}

    def _measure_for(self, trainer: Trainer) -> None:
        """Let the Trainer log the clipper's norm.

        To log a norm, the Trainer calls Accelerate's ``clip_grad_norm_`` with an infinite threshold before
        the step.  That would read all gradients a second time, and if one is infinite make all of them NaN.
        """
        accelerator = self._accelerator = trainer.accelerator
        clip_grad_norm_ = accelerator.clip_grad_norm_

        def clip_or_wait_for_the_clipper(
            parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2
        ) -> Any:
            clipper = self.clipper
            if (
                max_norm != math.inf
                or clipper is None
                or clipper.optimizer is not _unwrapped(trainer.optimizer)
            ):
                return clip_grad_norm_(parameters, max_norm, norm_type)
            parameters = list(parameters)
            if self._measures(clipper, parameters, norm_type):
                # The Trainer reads it after the step; it is NaN if a GradScaler has skipped the step.
                self._grad_norm = torch.full((), math.nan, dtype=torch.float64)
                return self._grad_norm
            accelerator.unscale_gradients()
            return get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)

        accelerator.clip_grad_norm_ = clip_or_wait_for_the_clipper
        backward = accelerator.backward

        def backward_with_loss(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self.clipper is not None:
                self.clipper.loss = loss  # divided by the number of backward passes of a step already
            backward(loss, *args, **kwargs)

        accelerator.backward = backward_with_loss

    def _measures(self, clipper: Clipper, parameters: Sequence[Tensor], norm_type: float) -> bool:
        """Whether the clipper measures this norm of these parameters' gradients; all ranks agree."""
        held = parameters_of(*clipper.optimizers)
        return float(self._options.get("norm_type", 2.0)) == norm_type and _trainable(held) == _trainable(
            parameters
        )

    def _note(self, record: Record) -> None:
        self._latest |= self._scalars(record)
        self._grad_norm.fill_(record.total_norm)
        if self._on_clip is not None:
            self._on_clip(record)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that Accelerate's wrapper, which has no hooks, wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def _trainable(parameters: Iterable[Tensor]) -> set[int]:
    return {id(p) for p in parameters if p.requires_grad}


def _calling_trainer() -> Trainer | None:
    """The Trainer that is calling a callback.

    No public way leads to it: it passes its callbacks everything but itself (huggingface/transformers#38181),
    and neither the model nor the optimizer knows its Accelerator.
    """
    callers = (frame.f_locals.get("self") for frame, _ in traceback.walk_stack(None))
    return next((caller for caller in callers if isinstance(caller, Trainer)), None)
