"""Clipping on several ranks; what is checked on them is in the modules named ``…_checks``."""

import copies_checks
import distributed_checks
import in_step_checks
import pytest
from distributed_helpers import Check, Ranks, checks_of


@pytest.mark.parametrize(
    "with_kernel",
    [pytest.param(True, id="kernel"), pytest.param(False, id="torch operations", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("check", checks_of(copies_checks, distributed_checks, in_step_checks))
def test_on_ranks(ranks: Ranks, check: Check, with_kernel: bool) -> None:
    errors = ranks.run(check, with_kernel)
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
