"""Clipping on several ranks; what is checked on them is in the modules named ``…_checks``."""

import copies_checks
import exchange_checks
import in_step_checks
import mesh_checks
import model_checks
import norm_checks
import pytest
import training_checks
from distributed_helpers import Check, Ranks, checks_of

MODULES = (
    copies_checks,
    exchange_checks,
    in_step_checks,
    mesh_checks,
    model_checks,
    norm_checks,
    training_checks,
)


@pytest.mark.parametrize(
    "with_kernel",
    [pytest.param(True, id="kernel"), pytest.param(False, id="torch operations", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("check", checks_of(*MODULES))
def test_on_ranks(ranks: Ranks, check: Check, with_kernel: bool) -> None:
    errors = ranks.run(check, with_kernel)
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
