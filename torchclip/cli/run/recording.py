"""Everything that is recorded while a program runs."""

from __future__ import annotations

from torchclip import patch
from torchclip.cli.run.calls import Calls
from torchclip.cli.run.functions import FunctionRecorder
from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import Trial


class Recording:
    """Installs torchclip, and records the program's calls, losses and steps until it is detached.

    Args:
        trial: the clipping to try.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.calls = Calls()
        self.losses = LossRecorder()
        self.functions = FunctionRecorder(self.calls, self.losses, trial)
        self.steps = StepRecorder(trial, self.calls, self.losses)

    def attach(self) -> None:
        """Record from now on."""
        patch.install()
        self.functions.attach()
        self.losses.attach()
        self.steps.attach()

    def detach(self) -> None:
        """Stop recording; torchclip's functions stay."""
        self.steps.detach()
        self.losses.detach()
        self.functions.detach()
