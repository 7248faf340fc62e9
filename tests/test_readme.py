"""What the documents promise is run: every Python block of README.md and CONTRIBUTING.md, and the commands shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omni.cli import app

README, CONTRIBUTING = (Path(name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_python_blocks_run(document: str) -> None:
    """All of a document are one script: a reader goes from top to bottom."""
    script = "\n".join(blocks(document, "python"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"print\(.*\)  # (.*)$", script, re.MULTILINE)
    assert shown
    assert done.stdout.splitlines() == shown


@pytest.mark.parametrize("block", blocks(README, "console"), ids=lambda block: block.split("\n")[0])
def test_commands_print_what_is_shown(block: str) -> None:
    command, shown = block.split("\n", 1)
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "omni"
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert [line.strip() for line in result.stdout.splitlines()] == [line.strip() for line in shown.splitlines()]


def test_links_inside_the_repository_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)|src=\"(?!https?://)([^\"]+)\"", README + CONTRIBUTING)
    assert links
    missing = [link for pair in links for link in pair if link and not Path(link).exists()]
    assert missing == []


def test_the_file_tree_is_that_of_the_repository() -> None:
    """Each line names a file or folder that exists; indentation of two spaces goes one folder down."""
    (tree,) = [block for block in blocks(README, "text") if "omni/" in block]
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[:depth], name]
        assert Path(*folders).exists(), "/".join(folders)


def test_the_two_commands_that_ci_runs_are_there() -> None:
    for name in ("ask", "test"):
        assert len(re.findall(rf"^<!-- ci: {name} -->\n```bash\n.*?^```$", README, re.DOTALL | re.MULTILINE)) == 1
