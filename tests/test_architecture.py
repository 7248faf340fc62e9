"""The arrows of the design, read from the code: what may import what, and what must not be in the repository at all.

docs/architecture.md draws the rooms of omni as floors. An import points to a floor below, or stays in its room. Every import
counts, also one inside a function: that makes starting up cheap, but it is an arrow all the same.
"""

import ast
import fnmatch
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arrow:
    """One import of one module of omni, or of a package from outside, by another."""

    source: str
    target: str
    line: int
    at_start: bool  # as soon as the file is imported, rather than inside a function or for types only

    def __str__(self) -> str:
        return f"{self.source} imports {self.target} (line {self.line})"


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in sorted((ROOT / "omni").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def arrows() -> list[Arrow]:
    return [arrow for name, path in modules().items() for arrow in read_arrows(name, path)]


def read_arrows(name: str, path: Path) -> list[Arrow]:
    """The imports of one file, down to the submodule: `from omni.data import scenes` -> omni.scenes.scenes."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_types(block)
        for node in ast.walk(block)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    result = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Constant):
            continue
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            targets = [each if each in modules() else base for each in submodules]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # imported by its name: entry points such as "omni.cli.app:main", tables of lazy imports
            named = re.fullmatch(r"(omni(?:\.\w+)+)(?::\w+)?", node.value)
            targets = [named[1]] if named and named[1] in modules() else []
        at_start = id(node) not in later and not isinstance(node, ast.Constant)
        result += [Arrow(name, each, node.lineno, at_start) for each in dict.fromkeys(targets)]
    return result


def is_for_types(block: ast.AST) -> bool:
    return isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def room(name: str) -> str:
    """The folder or file of omni/ that a module lies in; of `omni/__init__.py` "omni"."""
    return name.split(".")[1] if "." in name else name


@cache
def floors() -> dict[str, int]:
    """The floor of each room, from 0 on the ground, as docs/architecture.md draws them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (drawn,) = re.findall(r"^```text floors\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = [line.split("#")[0].split() for line in drawn.splitlines()]
    return {name: height for height, line in enumerate(reversed(lines)) for name in line}


def entry_points() -> list[str]:
    """Modules that start from outside: commands, and the plug-ins that the registry finds by their entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project.get("scripts", {}), *project.get("entry-points", {}).values()]
    return sorted({value.split(":")[0] for group in groups for value in group.values()})


def plugins() -> set[str]:
    """Modules named as "module:attribute", in pyproject.toml or in `omni/__init__.py`: loaded when asked for."""
    text = modules()["omni"].read_text(encoding="utf-8")
    return {*entry_points(), *re.findall(r"[\"'](omni(?:\.\w+)+):\w+[\"']", text)}


def listed(broken: list[Arrow]) -> str:
    return "\n".join(map(str, broken))


# --- Arrows -----------------------------------------------------------------------------------------------------------


def test_the_drawing_shows_every_room() -> None:
    deleted = {aside for aside in ASIDE if not (ROOT / "omni" / aside).is_dir()}
    assert set(floors()) - deleted == {room(name) for name in modules()} - {"omni", "__main__"}


def test_imports_point_to_a_floor_below() -> None:
    """`omni/__init__.py` gathers names for users, `auto` puts classes into tables: both by name, when they are wanted."""
    broken = [
        arrow
        for arrow in arrows()
        if is_in(arrow.target, "omni.") or arrow.target.startswith("omni.")
        if room(arrow.source) not in ("omni", "auto", "__main__", room(arrow.target))
        if floors()[room(arrow.target)] >= floors()[room(arrow.source)]
    ]
    assert not broken, listed(broken)


def test_only_the_command_uses_the_public_names() -> None:
    """Whoever `omni/__init__.py` gathers its names from cannot import them from there."""
    broken = [a for a in arrows() if a.target == "omni" and room(a.source) not in ("cli", "__main__")]
    assert not broken, listed(broken)


@pytest.mark.parametrize("name", ["omni.vision.pictures", "omni.scenes.drawing"])
def test_pictures_need_no_model(name: str) -> None:
    broken = [a for a in arrows() if a.source == name and is_in(a.target, "torch", "transformers")]
    assert not broken, listed(broken)


ASIDE = {
    "vision": ("omni", "omni.auto", "omni.fast"),
    "audio": ("omni", "omni.auto", "omni.fast"),
    "fast": ("omni", "omni.auto", "omni.cli.benching"),
    "scenes": ("omni",),
}
"""Rooms that can be deleted, and who may name them; `omni` itself names them to load them when they are wanted."""


@pytest.mark.parametrize("aside", ASIDE)
def test_a_room_that_can_be_deleted_is_known_to_few(aside: str) -> None:
    rooms = [f"omni.{aside}", *ASIDE[aside][1:]]
    broken = [a for a in arrows() if is_in(a.target, f"omni.{aside}") and not is_in(a.source, *rooms)]
    broken = [a for a in broken if a.source != "omni"]
    assert not broken, listed(broken)


@pytest.mark.parametrize("plugin", ["vision", "audio"])
def test_omni_works_when_a_plugin_of_its_own_is_deleted(
    plugin: str, tmp_path: Path, python: Callable[..., Any]
) -> None:
    """Really deleted: what is left imports, and transformers' Auto classes with it."""
    shutil.copytree(ROOT / "omni", tmp_path / "omni", ignore=shutil.ignore_patterns(plugin, "__pycache__"))
    code = (
        "import omni; from omni import OmniForConditionalGeneration, OmniProcessor; "
        "from transformers import AutoConfig, AutoModel, AutoProcessor; print(omni.__file__)"
    )
    run = python("-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path)


def test_no_circles() -> None:
    """Not even between modules of one layer, and not through an import inside a function."""
    targets: dict[str, set[str]] = {name: set() for name in modules()}
    for arrow in arrows():
        if arrow.source != "omni" and arrow.target in modules() and arrow.target != arrow.source:
            targets[arrow.source].add(arrow.target)

    def visit(name: str, path: tuple[str, ...], done: set[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(targets[name]):
                visit(target, (*path, name), done)
            done.add(name)

    finished: set[str] = set()
    for name in targets:
        visit(name, (), finished)


def test_importing_omni_is_cheap() -> None:
    """Neither torch nor transformers is imported before somebody asks for a name that needs it."""
    code = "import sys, omni; print(*sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# --- From a picture to an answer --------------------------------------------------------------------------------------


@cache
def tables() -> tuple[list[str], list[str]]:
    """The files that docs/architecture.md has a reader follow, in order, and those that they call."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chapter = page.split("## From a picture to an answer")[1].split("## ")[0]
    path, called = chapter.split("They call these files.")
    return re.findall(r"`(omni/[\w/]+\.py)`", path), re.findall(r"`(omni/[\w/]+\.py)`", called.split("\nSpeed")[0])


def test_the_path_from_a_picture_to_an_answer_has_900_lines_at_most() -> None:
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tables()[0]}
    assert len(lines) == 7
    assert sum(lines.values()) <= 900, lines


def test_a_picture_meets_the_files_of_the_page_on_its_way_and_no_other() -> None:
    """Followed call by call, with the reference's arithmetic: without acceleration."""
    from PIL import Image

    from omni.fusion import acceleration
    from omni.items import Item
    from omni.loading.checkpoint import load
    from omni.session import Session

    model, processor = load(ROOT / "checkpoints" / "omni_tiny")
    picture = Item("image", Image.open(ROOT / "examples" / "scene.png"))
    run: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_flags & inspect.CO_NEWLOCALS:  # of functions, not of modules and classes
            run.add(frame.f_code.co_filename)

    with acceleration.using(acceleration.Acceleration()):
        sys.setprofile(note)
        try:
            said = Session(model, processor, [picture]).ask("what color is the circle").answer
        finally:
            sys.setprofile(None)
    assert said == "red"
    met = {Path(file).relative_to(ROOT).as_posix() for file in run if file.startswith(str(ROOT / "omni"))}
    path, called = tables()
    assert met - {*path, *called} == set()
    assert {*path} - met == set()


# --- Modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", entry_points())
def test_entry_points_exist(name: str) -> None:
    assert name in modules()


def test_no_module_is_left_over() -> None:
    """Each is reached by imports from the public names, a command, a plug-in, an example or a benchmark."""
    missing = [name for name in entry_points() if name not in modules()]
    if missing:
        pytest.skip(f"cannot be judged without {', '.join(missing)}")
    reached: set[str] = set()
    waiting = [name for name in modules() if name.endswith(".__main__")] + ["omni", *entry_points()]
    for folder in ("examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            waiting += [arrow.target for arrow in read_arrows(path.stem, path)]
    while waiting:
        name = waiting.pop()
        if name in modules() and name not in reached:
            reached.add(name)
            waiting += [name.rpartition(".")[0], *(arrow.target for arrow in arrows() if arrow.source == name)]
    assert sorted(set(modules()) - reached) == []


def test_a_helper_lives_beside_its_caller() -> None:
    """A file named for what it is not about anything grows without end."""
    vague = {"util", "utils", "common", "helper", "helpers", "misc"}
    found = [path for path in files() if vague & {Path(part).stem.strip("_") for part in path.relative_to(ROOT).parts}]
    assert found == []


# --- Files ------------------------------------------------------------------------------------------------------------

# Written as patterns, this file does not contain what it looks for.
PRIVATE = {
    "a path of one machine": rb"(?<![\w.~$}-])/(?:work|workspace|root|home|Users|mnt|opt|srv|scratch)/[\w.]",
    "a path of one machine on Windows": rb"\b[C-Z]:\\\\?(?:Users|work)\\",
    "a file address": rb"\bfile:/{2}[/\w]",
    "a package registry": rb"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org)\b",
    "an option for one": rb"--(?:extra-)?index-url|--find[-]links|--trusted[-]host|\b(?:PIP|UV)_\w*(?:INDEX|LINKS)",
    "a local version of a package": rb"==\d+\.[\w.]*\+[a-z]{2}",
}


@cache
def files() -> list[Path]:
    """What is or would be committed: everything but what .gitignore names."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", *(line.strip("/") for line in lines if line and not line.startswith("#"))]

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            inside = str(path.relative_to(ROOT))
            if any(fnmatch.fnmatch(path.name, each) or fnmatch.fnmatch(inside, each) for each in ignored):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            elif path.is_file():
                yield path

    return list(walk(ROOT))


@pytest.mark.parametrize("what", PRIVATE)
def test_the_repository_does_not_know_where_it_was_made(what: str) -> None:
    """Also in checkpoints and pictures: a saved configuration likes to remember the folder that it was saved from."""
    pattern = re.compile(PRIVATE[what])
    found = []
    for path in files():
        match = pattern.search(path.read_bytes())
        if match:
            found.append(f"{path.relative_to(ROOT)}: {match[0].decode(errors='replace')!r}")
    assert found == [], what


def test_the_patterns_find_what_they_are_for() -> None:
    private, windows, address, registry, option, local = (re.compile(each) for each in PRIVATE.values())
    slash = b"/"
    assert private.search(b'"' + slash.join([b"", b"home", b"me", b"data.json"]) + b'"')
    assert private.search(b"open(" + slash.join([b"", b"root", b"x"]))
    assert not private.search(b"https://example.org" + slash.join([b"", b"home", b"me"]))
    assert not private.search(slash.join([b"omni", b"work", b"x"]))
    assert windows.search(b"C:" + b"\\Users\\me")
    assert address.search(b"file:" + b"//" + b"/x")
    assert registry.search(b"https://" + b"pypi" + b".org/simple")
    assert option.search(b"pip install --extra-" + b"index-url x")
    assert local.search(b"torch==2.13.0" + b"+cpu")
