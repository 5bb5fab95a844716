"""The code in README.md and on the pages of the documentation runs, by Sybil.

A block that is fenced as ``python`` is a complete program.  One that is fenced as
``pycon`` is a session whose outputs must be those printed; the sessions of a page continue each other.
"""

import doctest
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown import CodeBlockParser, SkipParser

import torchclip


class _Program(PythonEvaluator):
    """Runs a block with no names but its own."""

    def __call__(self, example: Example) -> None:
        of_page = dict(example.namespace)
        example.namespace.clear()
        try:
            super().__call__(example)
        finally:
            example.namespace.clear()
            example.namespace.update(of_page)


class _Sessions:
    """Finds the blocks that are sessions, each statement of them an example."""

    def __init__(self) -> None:
        self._blocks = CodeBlockParser("pycon", DocTestEvaluator())
        flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        self._statements = DocTestStringParser(DocTestEvaluator(flags))

    def __call__(self, document: Document) -> Iterable[Region]:
        for block in self._blocks(document):
            for statement in self._statements(block.parsed, document.path):
                statement.adjust(block, block.parsed)
                yield statement


def _names_for_conditions(namespace: dict[str, Any]) -> None:
    namespace["torch_version"] = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each program starts without the names of the previous one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    yield
    torchclip.uninstall()


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", _Program()), _Sessions(), SkipParser()],
    path=str(Path(__file__).parents[2]),
    patterns=["README.md", "docs/*.md"],
    setup=_names_for_conditions,
    fixtures=["as_a_reader"],
).pytest()
