"""The Clipper on several ranks; the checks are in ``clipper_rank_checks.py``."""

import clipper_rank_checks
import pytest
from distributed_helpers import Check, Ranks, checks_of


@pytest.mark.parametrize(
    "with_kernel",
    [pytest.param(True, id="kernel"), pytest.param(False, id="torch operations", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("check", checks_of(clipper_rank_checks))
def test_clipper_on_ranks(ranks: Ranks, check: Check, with_kernel: bool) -> None:
    ranks.run(check, with_kernel)
