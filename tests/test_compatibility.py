"""The compatibility table is what its script makes, and every test that it names is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def compatibility() -> ModuleType:
    """The script."""
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "packaging" / "compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


class Collected:
    """A plugin of pytest that notes what a run would run."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = {item.nodeid for item in session.items}


@pytest.fixture(scope="module")
def collected(compatibility: ModuleType) -> set[str]:
    """Tests of the files that the table links to, with and without their parameters."""
    files = {name.partition("::")[0] for name in compatibility.tests_named()}
    missing = [file for file in files if not (ROOT / file).is_file()]
    assert missing == []
    plugin = Collected()
    # A run inside the run: the libraries are loaded already, which a process of its own would take its time for.
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider"]
    assert pytest.main([*arguments, "--rootdir", str(ROOT), *(str(ROOT / f) for f in files)], plugins=[plugin]) == 0
    return plugin.names | {name.partition("[")[0] for name in plugin.names}


def test_the_document_is_current(compatibility: ModuleType) -> None:
    assert compatibility.DOCUMENT.read_text(encoding="utf-8") == compatibility.render(), "run make compatibility"


def test_every_test_that_is_named_exists(compatibility: ModuleType, collected: set[str]) -> None:
    assert sorted(compatibility.tests_named() - collected) == []


def test_a_test_that_is_gone_would_be_noticed(collected: set[str]) -> None:
    assert "tests/integration/test_features.py::test_feature[telepathy-greedy]" not in collected
    assert "tests/integration/test_features.py::test_feature" in collected


def test_every_row_says_what_it_stands_on(compatibility: ModuleType) -> None:
    rows = [row for section in compatibility.SECTIONS.values() for row in section]
    assert {row.state for row in rows} <= compatibility.STATES.keys()
    assert len({row.feature for row in rows}) == len(rows)
    for row in rows:
        assert row.note.endswith("."), row.feature
        # What is refused is a sentence in the code; whatever is claimed to work has a test.
        assert row.tests or row.state in ("refused", "open"), row.feature


def test_every_feature_that_is_tested_is_in_the_table(compatibility: ModuleType, collected: set[str]) -> None:
    prefix = "tests/integration/test_features.py::test_feature["
    tested = {name for name in collected if name.startswith(prefix) and not name.startswith(f"{prefix}nothing")}
    assert sorted(tested - compatibility.tests_named()) == []
