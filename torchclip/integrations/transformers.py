"""A Clipper on the optimizer of a Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchclip.clipper.clipper import Clipper, Nonfinite, Scope
from torchclip.history.records import Record
from torchclip.integrations.loggers import Scalars
from torchclip.thresholds.base import MaxNorm

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torchclip.integrations.transformers needs transformers and accelerate; install them with: "
        "pip install 'torchclip[transformers]'"
    ) from error

__all__ = ["ClipperCallback"]


class ClipperCallback(TrainerCallback, ExportableState):
    """Clips in every step of the Trainer's optimizer, in the place of the Trainer's own clipping:

        args = TrainingArguments(max_grad_norm=0.0, ...)
        trainer = Trainer(model, args, callbacks=[ClipperCallback(max_norm=1.0)], ...)

    Checkpoints carry the clipper's state in ``trainer_state.json``; it comes back with every
    ``resume_from_checkpoint``.

    ``clip/total_norm``, ``clip/max_norm`` and ``clip/clipped_share`` go into ``trainer.state.log_history``,
    and into the logs that callbacks after this one see, such as the printed ones.  Callbacks of
    ``report_to`` come before those of the user: for them pass ``on_clip``, with one of
    ``torchclip.integrations.loggers`` or ``torchclip.integrations.tensorboard``.

    Not for DeepSpeed and FSDP1, which keep the gradients to themselves: there use ``max_grad_norm``.

    Args:
        max_norm: as for ``torchclip.Clipper``.
        norm_type: likewise.
        scope: likewise.
        nonfinite: likewise.
        on_clip: likewise.

    Attributes:
        clipper (Clipper | None): the clipper, from the start of training; its history stays readable
            afterwards.
    """

    def __init__(
        self,
        max_norm: MaxNorm,
        *,
        norm_type: float | str = 2.0,
        scope: Scope = "global",
        nonfinite: Nonfinite = "propagate",
        on_clip: Callable[[Record], object] | None = None,
    ) -> None:
        self._max_norm = max_norm
        self._options: dict[str, Any] = {"norm_type": norm_type, "scope": scope, "nonfinite": nonfinite}
        self._on_clip = on_clip
        self._scalars = Scalars()
        self._latest: dict[str, float] = {}
        self.clipper: Clipper | None = None

    def on_init_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Refuse what would replace this callback.

        Raises:
            ValueError: if ``restore_callback_states_from_checkpoint`` is set.
        """
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "TrainingArguments(restore_callback_states_from_checkpoint=True) would put a new "
                "ClipperCallback in the place of this one; leave it out: its state comes back anyway"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the clipper on the optimizer, and load its state if training goes on from a checkpoint.

        Raises:
            ValueError: if the Trainer clips too.
        """
        if args.max_grad_norm:
            raise ValueError(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}), 1.0 by default, would clip before "
                "ClipperCallback does; pass max_grad_norm=0.0"
            )
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it, without the hooks
        if self.clipper is not None:
            self.clipper.detach()  # an exception may have ended the training before
        self.clipper = Clipper(optimizer, self._max_norm, on_clip=self._note, **self._options)
        # A checkpoint from before this callback has no entry, but the Trainer relies on one when it saves.
        entries: Any = state.stateful_callbacks
        saved = entries.setdefault(type(self).__name__, self.state())["attributes"]["clipper"]
        if state.global_step > 0 and saved is not None:
            self.clipper.load_state_dict(saved)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the numbers of the latest step."""
        if "loss" in kwargs["logs"]:
            kwargs["logs"].update(self._latest)
            state.log_history[-1].update(self._latest)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the clipper off."""
        if self.clipper is not None:
            self.clipper.detach()

    def state(self) -> dict[str, Any]:
        """The clipper's state, for the checkpoint."""
        return {"args": {}, "attributes": {"clipper": self.clipper and self.clipper.state_dict()}}

    def _note(self, record: Record) -> None:
        self._latest = self._scalars(record)
        if self._on_clip is not None:
            self._on_clip(record)
