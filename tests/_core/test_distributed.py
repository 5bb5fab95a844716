"""Clipping on several ranks; what is checked on them is in ``distributed_checks.py``."""

import distributed_checks
import pytest
from distributed_helpers import Ranks, checks_of


@pytest.mark.parametrize("check", checks_of(distributed_checks))
def test_on_ranks(ranks: Ranks, check: str, kernel_on_and_off: str) -> None:
    errors = ranks.run(getattr(distributed_checks, check), kernel_on_and_off == "kernel")
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
