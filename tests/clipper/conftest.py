"""The ways that a step's gradients can go, where each of them is to be tested."""

from collections.abc import Iterator

import pytest

from torchclip import kernel
from torchclip._core import native
from torchclip.clipper import fused

_ACTIVE = kernel.status().startswith("active")
_WAYS = ["short way", "kernel", "torch operations"] if _ACTIVE else ["torch operations"]


@pytest.fixture(scope="module", params=_WAYS)
def each_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests as usual, and twice with all that a usual step of a few elements leaves out.

    Then fused steps multiply the gradients even where they are so small that it does not pay.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "short way":
            yield request.param
            return
        patch.setattr(fused, "_TOO_SMALL", 0)
        if request.param == "kernel":
            patch.setattr(native, "clip_step", lambda *_: None)
            yield request.param
            return
        with kernel.disabled():
            yield request.param
