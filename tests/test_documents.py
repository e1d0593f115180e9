"""The documents against the repository: links, flags and files that they name are there."""

import contextlib
import dataclasses
import functools
import importlib
import io
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("example/*/README.md"), *ROOT.glob("layerprofile/*.md")]
)
TOOLS = {"help", "config", "print_config"}  # the parser's own


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be reached, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            target = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(target), f"{link}: no such heading"


def commands(page: Path) -> Iterator[str]:
    """Each command of a page's shell blocks, on one line."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        yield from block.replace("\\\n", " ").splitlines()


def flags_of(command: str) -> tuple[set[str], set[str]] | None:
    """The flags that a command uses and those that its program has, or None for other programs."""
    found = re.search(r"(train\.py|python -m ([a-z_]+\.[a-z_]+)) (.*)", command)
    if found is None:
        return None
    used = set(re.findall(r"--([a-z]\w*)", found.group(3)))
    if found.group(2) is None:
        return used, {f.name for group in train.FLAGS for f in dataclasses.fields(group)} | TOOLS
    return used, flags_in_help(found.group(2))


@functools.cache
def flags_in_help(module: str) -> set[str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return set(re.findall(r"--([a-z]\w*)", text.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_use_flags_that_exist(page):
    for command in commands(page):
        flags = flags_of(command)
        if flags is not None:
            assert flags[0] <= flags[1], f"{flags[0] - flags[1]} in: {command}"


def test_the_map_of_the_tree_has_every_file_and_no_other():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("## Map of the tree")[2].split("```")[1].splitlines()
    path: list[str] = []
    named: set[str] = set()
    for line in filter(str.strip, lines):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        path = [*path[:depth], name]
        named.add("".join(path))
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing
    modules = [f for f in listed.stdout.split() if re.match(r"(rwkv|peft|losses|data)/.*\.py$", f)]
    for module in modules:
        known = module.endswith("/__init__.py") or any(fnmatch(module, name) for name in named)
        assert known, f"{module} is not in the map of README.md"
