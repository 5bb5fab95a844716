"""Clipping on several ranks; the checks are in the modules named ``…_checks``."""

from importlib import import_module
from pathlib import Path

import pytest
from distributed_helpers import Check, Ranks, checks_of
from training_checks import check_clipper_over_groups

MODULES = [import_module(path.stem) for path in sorted(Path(__file__).parent.glob("*_checks.py"))]
# What ranks exchange does not depend on whether the kernel measures the gradients.
WITHOUT_KERNEL = [module for module in MODULES if module.__name__.startswith(("norm", "replicas"))]
# Of training, one check is enough: that of the policies for gradients that are not finite.
OF_A_CLIPPER = pytest.param(check_clipper_over_groups, id="check_clipper_over_groups")


@pytest.mark.parametrize("check", checks_of(*MODULES))
def test_on_ranks(ranks: Ranks, check: Check) -> None:
    ranks.run(check, with_kernel=True)


@pytest.mark.slow
@pytest.mark.parametrize("check", [*checks_of(*WITHOUT_KERNEL), OF_A_CLIPPER])
def test_on_ranks_without_the_kernel(ranks: Ranks, check: Check) -> None:
    ranks.run(check, with_kernel=False)
