"""Clipping on several ranks; the checks are in the modules named ``…_checks``."""

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
# What ranks exchange does not depend on whether the kernel measures the gradients.
WITHOUT_KERNEL = (copies_checks, norm_checks, training_checks)


@pytest.mark.parametrize("check", checks_of(*MODULES))
def test_on_ranks(ranks: Ranks, check: Check) -> None:
    _run(ranks, check, with_kernel=True)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks_of(*WITHOUT_KERNEL))
def test_on_ranks_without_the_kernel(ranks: Ranks, check: Check) -> None:
    _run(ranks, check, with_kernel=False)


def _run(ranks: Ranks, check: Check, with_kernel: bool) -> None:
    errors = ranks.run(check, with_kernel)
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
