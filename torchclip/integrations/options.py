"""The arguments that a framework's callback passes on to its Clippers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torchclip.clipper.clipper import Clipper

_SET_BY_THE_CALLBACK = ("optimizer", "max_norm", "model", "on_clip")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an error for options that a ``Clipper`` does not have, before any training begins."""
    known = [name for name in inspect.signature(Clipper).parameters if name not in _SET_BY_THE_CALLBACK]
    wrong = [name for name in options if name not in known]
    if wrong:
        raise TypeError(
            f"ClipperCallback has no argument {', '.join(map(repr, wrong))}; besides its own it takes "
            f"those of a Clipper: {', '.join(known)}"
        )
