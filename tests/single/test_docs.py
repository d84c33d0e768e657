"""The documentation: generated pages are up to date, links lead somewhere, README stays one page."""

import importlib.util
import re

import pytest
from support.launching import ROOT

from hvdlarge import exits
from hvdlarge.train import main

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docker/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["job_file", "architecture"])
def test_generated_pages_are_up_to_date(generate, page):
    written = (ROOT / "docs" / f"{page.replace('_', '-')}.md").read_text(encoding="utf-8")
    assert written == getattr(generate, page)(), "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation_and_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.name in navigation
        assert page.name in ("index.md", "api.md") or f"docs/{page.name}" in readme


def test_every_exit_code_is_in_the_table_and_in_the_help(capsys):
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    text = text.split("## Exit codes")[1].split("## ")[0]
    codes = {
        int(code)
        for row in re.findall(r"^\| ([0-9, ]+) \|", text, re.MULTILINE)
        for code in row.split(",")
    }
    own = {value for name, value in vars(exits).items() if name.isupper() and type(value) is int}
    assert own | {kind.code for kind in exits.RunExit.__subclasses__()} == own
    # of mpirun, of a second Ctrl-C, and of ranks that a signal ended
    assert codes == own | {1, 205, 255} | {130} | {134, 137, 139}
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split("Exit codes:")[1].split())
    assert {int(code) for code in re.findall(r"\b\d+\b", shown)} == own
