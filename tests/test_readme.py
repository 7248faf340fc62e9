"""What the documents promise is run: README.md, CONTRIBUTING.md and the pages of docs/.

* Python: the blocks of a document are one script, as a reader goes from top to bottom. What it prints stands behind each
  `print` as a comment; an error stands in the text block right below, as Python says it.
* Commands with `$` print what is shown. Other commands are read by the real command line and not run.
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from omni.cli.app import app
from omni.training.recipe import Recipe

DOCUMENTS = {str(path): path.read_text("utf-8") for path in sorted([*Path().glob("*.md"), *Path("docs").glob("*.md")])}
README = DOCUMENTS["README.md"]
ELSEWHERE = {
    "docs/attention.md": "tests/looking/test_attention.py",
    "docs/compose.md": "tests/exchange/test_compose.py",
    "docs/micro-omni.md": "tests/exchange/micro_omni/test_command.py",
    "docs/teach.md": "tests/teaching/test_teach.py",
    "docs/serving.md": "tests/serving/test_server.py",
}
"""Pages that need something made first, and which test runs them."""
PACKAGE = "docs/adding-a-modality.md"
"""The page that is a package; it has a test of its own below."""
SMALLER = {
    "docs/embedding.md": {"(112, 224, 336, 448)": "(112,)", "(1, 2, 4, 8, 32, 128)": "(1, 2)", "] * 32": "] * 2"}
}
"""Pages that measure, and what is less here: what they print differs from machine to machine."""
LANGUAGES = {"python", "console", "bash", "toml", "json", "text", "text floors", "{eval-rst}"}
PROGRAMS = {"pytest", "ruff", "mypy", "sphinx-build", "accelerate", "sh"}
"""What bash blocks call beside omni, pip, Python and torchrun."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def having(language: str, without: object = ()) -> list[str]:
    return [name for name, text in DOCUMENTS.items() if blocks(text, language) and name not in without]


def shown(script: str) -> list[str]:
    return re.findall(r"^\s*print\(.*\)  # (.*)$", script, re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where what the documents name is there."""
    for name in ("checkpoints", "configs", "examples"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Python -----------------------------------------------------------------------------------------------------------


def test_the_readme_runs_in_a_fresh_process() -> None:
    script = "\n".join(blocks(README, "python"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert shown(script)
    assert done.stdout.splitlines() == shown(script)


def steps(text: str) -> Iterator[tuple[str, str | None]]:
    """The Python blocks of a page, and the error that is shown for each, if there is one."""
    for code, said in re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(\w+(?:Error|Exception): .*?)^```\n)?", text, re.DOTALL | re.MULTILINE
    ):
        yield code, said or None


@pytest.mark.parametrize("page", having("python", without={"README.md", PACKAGE, *ELSEWHERE}))
def test_python_runs_and_prints_what_is_shown(page: str, place: Path) -> None:
    names: dict[str, object] = {}
    for code, said in steps(DOCUMENTS[page]):
        out, found = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(out):
                for long, short in SMALLER.get(page, {}).items():
                    code = code.replace(long, short)
                exec(compile(code, page, "exec"), names)
        except Exception as error:
            if said is None:
                raise
            found = f"{type(error).__name__}: {error}"
        assert (found or "").split() == (said or "").split(), code
        if page not in SMALLER:
            assert out.getvalue().splitlines() == shown(code)


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items(), ids=list(ELSEWHERE))
def test_the_others_are_run_where_they_can_be(page: str, test: str) -> None:
    assert page in Path(test).read_text("utf-8")


def test_the_package_that_is_shown_is_installed_and_learns(tmp_path: Path, python: Callable[..., Any]) -> None:
    """Its files are written out and installed by pip, into a folder of their own; then come the other blocks."""
    text = DOCUMENTS[PACKAGE]
    plugin, *script = blocks(text, "python")
    path = tmp_path / "omni-wave" / plugin.split("\n")[0].removeprefix("# ")
    path.parent.mkdir(parents=True)
    path.write_text(plugin)
    path.with_name("__init__.py").touch()
    (tmp_path / "omni-wave/pyproject.toml").write_text(*blocks(text, "toml"))
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    target = [*options, "--target", tmp_path / "site", tmp_path / "omni-wave"]
    subprocess.run([sys.executable, "-m", "pip", "install", *target], check=True)

    def run(*arguments: str) -> list[str]:
        done = python(*arguments, path=[tmp_path / "site"])
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (console,) = blocks(text, "console")
    command, *listed = console.splitlines()
    assert run("-m", *command.split()[1:]) == listed
    printed = run("-c", "\n".join(script))
    assert [line for line in printed if "train_runtime" not in line] == [
        line for block in script for line in shown(block)
    ]


# --- Commands ---------------------------------------------------------------------------------------------------------


def transcripts() -> Iterator[tuple[str, str]]:
    """Each command with `$`, and what is shown below it."""
    for page in having("console", without={PACKAGE, *ELSEWHERE}):
        for block in blocks(DOCUMENTS[page], "console"):
            yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def with_sounds(command: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.new_chats] if ".wav" in command else []


@pytest.mark.parametrize(
    ("command", "output"),
    [pytest.param(*each, marks=with_sounds(each[0])) for each in dict.fromkeys(transcripts())],
)
def test_commands_print_what_is_shown(command: str, output: str, place: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "omni"
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert [line.strip() for line in result.output.splitlines()] == [line.strip() for line in output.splitlines()]
    assert result.exit_code == (2 if output.startswith("Error: ") else 0)


def test_the_commands_of_the_first_screen_run_as_they_stand(place: Path) -> None:
    (block,) = [block for block in blocks(README, "bash") if "omni embed examples " in block]
    for line in block.splitlines():
        assert CliRunner().invoke(app, shlex.split(line, comments=True)[1:], catch_exceptions=False).exit_code == 0
    assert Path("circle.png").is_file()
    assert Path("examples.parquet").is_file()


def test_the_rows_of_the_first_table_are_those_that_were_measured() -> None:
    rows = re.findall(r"^\| .* \|$", README.partition("## How fast it is")[2].partition("\n## ")[0], re.MULTILINE)
    measured = DOCUMENTS["docs/performance.md"].splitlines()
    assert len(rows) > 5
    assert [row for row in rows[1:] if row not in measured] == []


def commands() -> Iterator[tuple[str, str]]:
    for page in having("bash"):
        for block in blocks(DOCUMENTS[page], "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    if words := shlex.split(command, comments=True):
                        yield page, shlex.join(words)


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_commands_exist(page: str, command: str) -> None:
    """omni's are parsed as the command line parses them; of others it is looked whether what they name is there."""
    program, *words = (word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word))  # settings come first
    if program == "torchrun":
        program, words = "omni", words[words.index("omni") + 1 :]
    if program == "omni":
        group = typer.main.get_command(app)
        if words[0].startswith("--"):
            assert any(words[0] in parameter.opts for parameter in group.params)
        else:
            group.commands[words[0]].make_context(words[0], words[1:])
    elif program in ("pip", "python3"):
        extras = {extra for names in re.findall(r"\[(.+?)\]", command) for extra in names.split(",")}
        known = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        assert extras <= known.keys()
    elif program == "python":
        assert Path(words[0]).is_file() or words[:2] == ["-m", "benchmarks"]
    else:
        assert program in PROGRAMS or program == "."


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    for name, text in DOCUMENTS.items():
        assert set(re.findall(r"^```(.+)$", text, re.MULTILINE)) <= LANGUAGES, name
        for block in blocks(text, "toml"):
            tomllib.loads(block)
        for block in blocks(text, "json"):
            assert json.loads(f"{{{block}}}").keys() <= Recipe.model_fields.keys(), name


# --- Links, numbers, the tree -----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Those that a code host, and the site, make of the headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*DOCUMENTS, "checkpoints/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = Path(name).read_text("utf-8")
    for link in [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"src=\"([^\"]+)\"", text)]:
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = Path(name).parent / path if path else Path(name)
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_numbers_of_the_walk_are_those_of_the_module() -> None:
    """Every larger number in its prose and tables is printed by a block of the page; but for quotes of the document."""
    text = DOCUMENTS["docs/vision-encoder.md"]
    printed = "\n".join([*shown("\n".join(blocks(text, "python"))), *blocks(text, "console")])
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r'"[^"]*"', "", prose)
    numbers = {number for number in re.findall(r"\d[\d,]*\d", prose) if len(number) > 2}
    assert len(numbers) > 5
    known = set(re.findall(r"\d[\d,]*\d", printed))
    assert {number for number in numbers if number not in known and number.replace(",", "") not in known} == set()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README))
    assert linked == {name for name in DOCUMENTS if name.startswith("docs/")} - {"docs/experiments.md"}


def test_the_two_commands_that_ci_runs_are_there() -> None:
    """The second is of three parts: CI checks formatting and types between the last two."""
    for name, parts in (
        ("ask", ["python3 -m venv", ". ", "pip", "omni ask"]),
        ("test", [". ", "pip install", "pytest"]),
    ):
        (block,) = re.findall(rf"^<!-- ci: {name} -->\n```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        found = block.split(" && ")
        assert len(found) == len(parts)
        assert all(command.startswith(part) for command, part in zip(found, parts, strict=True))
