"""A new threshold or rule of clipping needs several entries; these tests say which are missing.

They find classes and functions in the folders, not in a list, and look for the twin, the entries in the
documentation, the option and the property test of each.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from functions import FUNCTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

import torchclip
from torchclip import history, reference
from torchclip.cli.run.trial import CLASSES
from torchclip.history.layers import Layers
from torchclip.integrations.loggers import DictLogger
from torchclip.integrations.tensorboard import ScalarLogger
from torchclip.ranks_report import RanksReport

ROOT = Path(__file__).parents[1]


def defined_in(package: ModuleType) -> dict[str, Any]:
    """The public classes and functions that a package's files define and export, by name."""
    found = {}
    for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(file.name)
        for name, each in vars(module).items():
            if not name.startswith("_") and getattr(each, "__module__", None) == module.__name__:
                found[name] = each
    return found


def thresholds_in(package: ModuleType) -> dict[str, Any]:
    """The thresholds among these: classes that can be made, with ``update`` and a state."""
    return {
        name: each
        for name, each in defined_in(package).items()
        if inspect.isclass(each)
        and not inspect.isabstract(each)
        and not getattr(each, "_is_protocol", False)
        and callable(getattr(each, "update", None))
        and callable(getattr(each, "load_state_dict", None))
    }


THRESHOLDS = thresholds_in(torchclip.thresholds)
RULES = {
    name: each
    for name, each in defined_in(torchclip.clip_grad).items()
    if (inspect.isclass(each) and hasattr(each, "clip_") and not inspect.isabstract(each))
    or re.match(r"clip_|get_", name)
}
ALL = [*THRESHOLDS, *RULES]


def taken_by_a_clipper(threshold: Any) -> bool:
    """Whether a Clipper takes it: not a QuantileTracker, which sees no norms."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    try:
        torchclip.Clipper(optimizer, threshold())
    except TypeError:
        return False
    return True


def test_what_there_is_was_found() -> None:
    assert {"Percentile", "ZScore", "AdaGC", "RollingSigma", "QuantileTracker"} <= THRESHOLDS.keys()
    assert {"Value", "Adaptive", "BlockRMS", "clip_grad_norm_", "clip_per_example"} <= RULES.keys()


@pytest.mark.parametrize("name", ALL)
def test_it_is_in_the_namespace(name: str) -> None:
    assert name in torchclip.__all__
    assert getattr(torchclip, name) is {**THRESHOLDS, **RULES}[name]


@pytest.mark.parametrize("name", torchclip.__all__)
def test_the_page_of_the_api_has_all_public_names(name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"::: torchclip\.{name}[.\n]", page)


STATE = "load_state_dict state_dict"
PUBLIC = {
    torchclip.Clipper: f"detach history last {STATE} loss max_norm norms optimizer optimizers thresholds",
    torchclip.Percentile: f"{STATE} max_norm percentile update warmup window",
    torchclip.ZScore: f"alpha clip_option {STATE} max_norm skip_update_on_spike threshold update warmup",
    torchclip.AdaGC: f"beta {STATE} max_norm relative update warmup",
    torchclip.RollingSigma: f"{STATE} sigma update warmup window",
    torchclip.QuantileTracker: f"{STATE} lr max_norm quantile update",
    torchclip.Threshold: f"{STATE} update",
    torchclip.Value: "clip_ clip_value",
    torchclip.Adaptive: "clip_ clip_factor eps",
    torchclip.BlockRMS: "clip_ max_rms",
    history.History: f"append as_dict layers {STATE} plot plot_layers suggest summary to_csv to_html",
    history.Record: "clip_coef clipped clipped_norm layers loss max_norm nonfinite skipped step total_norm",
    history.Summary: "clipped clipped_quantiles clipped_share kept largest_norm largest_step nonfinite "
    "quantiles skipped steps",
    history.Advice: "drifts explodes lines max_norm nonfinite reason spikes stalls steps table "
    "verdict warmup words",
    Layers: f"append {STATE} names norms read steps to_csv updates",
    RanksReport: "call different local missing norm norms ok seconds",
    ScalarLogger: "resume",
    DictLogger: "resume",
}
"""The attributes and methods for users.  A new one is added here on purpose, or gets an underscore."""


@pytest.mark.parametrize("kind", PUBLIC)
def test_attributes_and_methods_are_public_on_purpose(kind: type) -> None:
    own = [each for each in kind.__mro__ if each.__module__.startswith("torchclip.")]
    names = {name for each in own for name in [*vars(each), *vars(each).get("__annotations__", {})]}
    names |= {name for each in own for name in set_by(each)}
    assert {name for name in names if not name.startswith("_")} == set(PUBLIC[kind].split())


def set_by(kind: type) -> set[str]:
    """The attributes of ``self`` that the methods of a class set."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_all_public_classes_are_in_this_list() -> None:
    classes = {each for name in torchclip.__all__ if inspect.isclass(each := getattr(torchclip, name))}
    classes |= {getattr(history, name) for name in history.__all__}
    assert classes <= PUBLIC.keys()


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_is_exported_by_its_folder(name: str) -> None:
    assert name in torchclip.thresholds.__all__


@pytest.mark.parametrize("name", ALL)
def test_it_is_in_the_changelog(name: str) -> None:
    assert f"`{name}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_is_explained_on_its_page(name: str) -> None:
    assert name in (ROOT / "docs" / "thresholds.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", THRESHOLDS)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=10)
def test_a_threshold_computes_what_its_twin_does(name: str, seed: int, spread: float) -> None:
    """The twin has the constructor's arguments with the same defaults, and gives the same numbers."""
    threshold, twin = THRESHOLDS[name], twin_of(name)
    first, *others = inspect.signature(twin).parameters.values()
    defaults = {each.name: each.default for each in others}
    own = {each.name: each.default for each in inspect.signature(threshold).parameters.values()}
    assert own.items() <= defaults.items()

    values = np.exp(-spread * np.random.default_rng(seed).exponential(size=150))  # norms, or shares, up to 1
    expected = twin(values[:, None])[:, 0] if "Array" in str(first.annotation) else twin(values.tolist())
    learns = threshold()
    np.testing.assert_allclose([learns.update(value) for value in values], expected, rtol=1e-9)


def twin_of(name: str) -> Any:
    """The NumPy twin: of ``RollingSigma`` it is ``rolling_sigma_thresholds``."""
    twins = {each.replace("_", ""): each for each in reference.__all__}
    return getattr(reference, twins[f"{name.lower()}thresholds"])


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_is_an_option_of_the_commands(name: str) -> None:
    threshold = THRESHOLDS[name]
    assert taken_by_a_clipper(threshold) == (threshold in CLASSES.values())


@pytest.mark.parametrize("name", [name for name in RULES if not inspect.isclass(RULES[name])])
def test_a_function_is_in_the_table_of_functions(name: str) -> None:
    assert name in FUNCTIONS


@pytest.mark.parametrize("name", [name for name in RULES if inspect.isclass(RULES[name])])
def test_a_rule_is_tested_with_a_clipper(name: str) -> None:
    assert f"{name}(" in (ROOT / "tests" / "clipper" / "test_clipper_rules.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"]
)
def test_functions_take_what_torchs_take(name: str) -> None:
    """Those of the installed torch: if a new one has another argument, ours must have it, too."""
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    ours = inspect.signature(getattr(torchclip, name)).parameters
    assert [(p.name, p.default, p.kind) for p in theirs.values()] == [
        (p.name, p.default, p.kind) for p in ours.values() if p.name in theirs
    ]
    added = [p.kind for p in ours.values() if p.name not in theirs]
    assert set(added) <= {inspect.Parameter.KEYWORD_ONLY}
