"""Clipping on several ranks; what is checked on them is in ``distributed_checks.py``."""

import distributed_checks
import pytest
from distributed_helpers import MODES, checks_of, run_on_ranks


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    return run_on_ranks("distributed_checks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", checks_of(distributed_checks))
def test_on_ranks(errors: dict[tuple[str, str], list[str]], check: str, mode: str) -> None:
    if (check, mode) in errors:
        pytest.fail("\n".join(errors[check, mode]), pytrace=False)
