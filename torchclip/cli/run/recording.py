"""Everything that is recorded while a program runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torchclip import patch
from torchclip.cli.run.calls import Calls
from torchclip.cli.run.functions import FunctionRecorder
from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import Trial


@contextmanager
def recording(trial: Trial) -> Iterator[StepRecorder]:
    """Install torchclip, which stays, and record the program's calls, losses and steps in a block.

    Args:
        trial: the clipping to try.
    """
    calls, losses = Calls(), LossRecorder()
    steps = StepRecorder(trial, calls, losses)
    patch.install()
    with ExitStack() as stack:
        FunctionRecorder(calls, losses, trial).attach(stack)
        losses.attach(stack)
        steps.attach(stack)
        yield steps
