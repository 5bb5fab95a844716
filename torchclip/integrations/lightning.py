"""A Clipper on the optimizers of a Lightning Trainer."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchclip._core.extras import installing
from torchclip.clipper.clipper import Clipper
from torchclip.history.records import Record
from torchclip.integrations.loggers import Scalars
from torchclip.thresholds.base import MaxNorm, Rule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"torchclip.integrations.lightning needs lightning; install it with: {installing('lightning')}"
    ) from error

__all__ = ["ClipperCallback"]


class ClipperCallback(Callback):
    """Clips in every step of the Trainer's optimizers, with automatic and with manual optimization:

        trainer = Trainer(callbacks=[ClipperCallback(max_norm=1.0)])

    Each optimizer has its own ``torchclip.Clipper`` while ``fit`` runs, which uses the module's names for its
    parameters.  With a single optimizer, the records include the loss.  Checkpoints store the clippers'
    state, and another ``fit`` of the same module continues with it.  Do not pass ``gradient_clip_val`` to the
    Trainer as well.  For optimizers that step together in manual optimization, make one Clipper for both
    yourself.

    Args:
        max_norm: the threshold: whatever ``torchclip.Clipper`` takes as its ``max_norm``.
        log: whether to log ``clip/total_norm``, ``clip/clipped_norm``, ``clip/max_norm`` and
            ``clip/clipped_share`` (``clip_0/...``, ``clip_1/...`` for several optimizers) with the module's
            ``log_dict``, and with ``layers_every`` the norms of single parameters as ``clip_layers/...``.  On
            an accelerator this waits for the norm in every step.
        **options: the other arguments of ``torchclip.Clipper``, such as ``nonfinite``, ``skip_above``,
            ``skip_loss_above`` (with a single optimizer), ``layers_every`` and ``updates``; not ``model`` and
            ``on_clip``, which the callback passes.

    Raises:
        TypeError: for an argument that a ``Clipper`` does not have.

    Attributes:
        clippers (list[Clipper]): one for each optimizer, in order, from the start of ``fit``; their history
            can be read afterwards.
    """

    def __init__(self, max_norm: MaxNorm | Rule, *, log: bool = True, **options: Any) -> None:
        super().__init__()
        # Raises an error for options that a Clipper does not have, before any training begins.
        inspect.signature(Clipper).bind(None, max_norm, on_clip=None, model=None, **options)
        self._max_norm, self._options = max_norm, options
        self._log = log
        self._to_log: dict[str, float] = {}
        self._states: list[dict[str, Any]] = []
        self._scalars: list[Scalars] = []
        self._module: weakref.ref[LightningModule] | None = None
        self._fitting = False
        self.clippers: list[Clipper] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a clipper on each optimizer.

        Raises:
            ValueError: if the Trainer clips too, if its strategy hides the gradients from the optimizer, or
                if ``skip_loss_above`` comes with several optimizers.
        """
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip before ClipperCallback "
                "does; do not pass it"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"{type(trainer.strategy).__name__} hides gradients from ClipperCallback; use "
                "ModelParallelStrategy (FSDP2), or Trainer(gradient_clip_val=...) without this callback"
            )
        optimizers = trainer.optimizers
        several = len(optimizers) > 1
        if several and self._options.get("skip_loss_above") is not None:
            raise ValueError(
                f"`skip_loss_above` judges the loss of one optimizer, but this module has {len(optimizers)}; "
                "do not pass it, or make a Clipper yourself and assign its `loss`"
            )
        is_again = self._module is not None and self._module() is pl_module
        if is_again and not self._states and len(self.clippers) == len(optimizers):
            self._states = [clipper.state_dict() for clipper in self.clippers]
        self._module = weakref.ref(pl_module)
        self._scalars = [Scalars(f"clip_{i}" if several else "clip") for i in range(len(optimizers))]
        self.clippers = [
            Clipper(
                optimizer, self._max_norm, on_clip=self._note(scalars), model=trainer.model, **self._options
            )
            for optimizer, scalars in zip(optimizers, self._scalars, strict=True)
        ]
        self._fitting = True
        self._restore()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Record the loss, if there is only one optimizer."""
        if len(self.clippers) == 1:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            self.clippers[0].loss = loss.detach() / scale

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the batch's step, if there was one."""
        if self._to_log:
            pl_module.log_dict(self._to_log)
            self._to_log = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the clippers."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the clippers."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The clippers' state, for the checkpoint."""
        return {"clippers": [clipper.state_dict() for clipper in self.clippers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state from a checkpoint; the Trainer does so before the optimizers exist, or after."""
        self._states = list(state_dict["clippers"])
        if self._fitting:
            self._restore()
        else:
            self._module = None  # discards what the clippers have learned

    def _note(self, scalars: Scalars) -> Callable[[Record], None] | None:
        return (lambda record: self._to_log.update(scalars(record))) if self._log else None

    def _restore(self) -> None:
        states, self._states = self._states, []
        if not states:
            return
        if len(states) != len(self.clippers):
            raise ValueError(
                f"the checkpoint holds the state of {len(states)} clippers, "
                f"but there are {len(self.clippers)} optimizers"
            )
        for clipper, scalars, state in zip(self.clippers, self._scalars, states, strict=True):
            clipper.load_state_dict(state)
            scalars.resume(clipper.history)

    def _detach(self) -> None:
        self._fitting = False
        for clipper in self.clippers:
            clipper.detach()
