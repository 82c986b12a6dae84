"""What code and documents cite exists: pages, headings, files; and every module has a test file of its name."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tested_by import TESTED_BY

from megatron_sbn.runs import folder

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"docs/([\w/-]+\.md), \"([^\"]+)\"")
PAGE = re.compile(r"docs/([\w/-]+\.md)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
# `path/name.py` within backquotes: of the project, of megatron_sbn or of sbn_kernels.
FILE = re.compile(r"`([\w/]+/[\w/]*\w\.(?:py|sh|sbatch|yaml))`")
NOT_THERE = (
    "kernels/__init__.py",
    "kernels/sbn_kernels/NAME.py",
    "tests/kernels/test_NAME.py",
    "kernels/bench/NAME.py",
)
PLACES = (".", "megatron_sbn", "kernels/sbn_kernels", "kernels", "tests")


def tracked(*patterns: str) -> list[Path]:
    """Files of the project."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.stdout else [str(p.relative_to(ROOT)) for p in ROOT.rglob(patterns[0])]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def headings(page: Path) -> set[str]:
    return {line.lstrip("#").strip() for line in page.read_text().splitlines() if line.startswith("#")}


def wrong_citations(path: Path, text: str) -> Iterator[str]:
    """Pages and headings of docs/ that are named and are not there."""
    joined = re.sub(r"\s*\n\s*#?\s*", " ", text)  # a citation may be broken over lines
    for name in PAGE.findall(joined):
        if not (ROOT / "docs" / name).is_file():
            yield f"{path}: docs/{name} is not there"
    for name, heading in HEADING.findall(joined):
        if (ROOT / "docs" / name).is_file() and heading not in headings(ROOT / "docs" / name):
            yield f"{path}: docs/{name} has no heading {heading!r}"


def anchors(page: Path) -> set[str]:
    """What links to headings of a page are called."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


def wrong_links(path: Path, text: str) -> Iterator[str]:
    """Links to files and headings that are not there, and names of files that no folder has."""
    for target, anchor in ANCHOR.findall(text):
        page = path.parent / target if target else path
        if "://" not in target and page.is_file() and anchor not in anchors(page):
            yield f"{path}: links to {target}#{anchor}, which is not there"
    for target in LINK.findall(text):
        if "://" not in target and not (path.parent / target).exists():
            yield f"{path}: links to {target}, which is not there"
    for name in FILE.findall(text):
        if not any((ROOT / place / name).exists() for place in PLACES) and name not in NOT_THERE:
            yield f"{path}: names {name}, which is not there"


def test_cited_pages_and_headings_exist() -> None:
    sources = [p for p in tracked("*.py", "*.md", "*.yaml") if p.name != "test_documents.py"]
    assert [c for path in sources for c in wrong_citations(path.relative_to(ROOT), path.read_text())] == []


# Dated results name files as they were called then.
@pytest.mark.parametrize("page", [p for p in tracked("*.md") if p.name != "results-log.md"], ids=lambda p: p.name)
def test_linked_and_named_files_exist(page: Path) -> None:
    assert list(wrong_links(page, page.read_text())) == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text())}
    pages = [page for page in tracked("docs/*.md", "recipes/*.md", "slurm/*.md") if page != index]
    assert [str(page.relative_to(ROOT)) for page in pages if page not in linked] == []


def test_the_run_folder_page_names_every_file() -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text()
    names = [value for name, value in vars(folder).items() if name.isupper()]
    assert len(names) > 8
    assert [name for name in names if f"`{name}" not in page] == []


def test_what_is_not_there_is_found() -> None:
    here = ROOT / "README.md"
    assert list(
        wrong_citations(here, 'docs/nothing.md and docs/method.md, "Forward" and docs/method.md, "Sideways"')
    ) == [
        f"{here}: docs/nothing.md is not there",
        f"{here}: docs/method.md has no heading 'Sideways'",
    ]
    text = "[a](docs/method.md) [b](docs/none.md) `layers/linear.py` `layers/none.py` [c](#use) [d](docs/plan.md#none)"
    assert len(list(wrong_links(here, text))) == 3


def test_every_module_has_a_test_file() -> None:
    """Of its name (or its folder's and its name), among the tests of its package; or that of TESTED_BY."""
    files = tracked("tests/*.py")
    kernels = {path.stem for path in files if path.parent.name == "kernels"}
    others = {path.stem for path in files} - kernels
    without = set()
    for names, package in ((others, "megatron_sbn/*.py"), (kernels, "kernels/sbn_kernels/*.py")):
        for path in tracked(package):
            if (
                not path.stem.startswith("__")
                and not {f"test_{path.stem}", f"test_{path.parent.name}_{path.stem}"} & names
            ):
                without.add(str(path.relative_to(ROOT)))
    assert without == set(TESTED_BY)
    assert [file for file in TESTED_BY.values() if not (ROOT / "tests" / file).is_file()] == []
