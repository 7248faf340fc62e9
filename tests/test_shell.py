"""The command in a shell: completion in real ones, colours and moving lines on a terminal alone."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from omni.cli.app import app

BIN = Path(sys.executable).parent
ASK = ["omni", "ask", "examples/scene.png", "what color is the circle"]


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return kept | {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{kept['PATH']}", "TERM": "xterm-256color"} | more


def on_a_terminal(command: list[str], env: dict[str, str]) -> str:
    """All that a terminal gets of a command."""
    master, slave = pty.openpty()
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        shown = b""
        try:
            while more := os.read(master, 65536):
                shown += more
        except OSError:  # how Linux tells that the other side was closed
            pass
    os.close(master)
    assert process.returncode == 0, shown
    return shown.decode()


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    """Installed as the quickstart says, by a bash, into the file that the next bash reads; then Tab is pressed."""
    env = environment(tmp_path)
    subprocess.run(["bash", "-c", "omni --install-completion; true"], check=True, env=env, capture_output=True)
    presses = "\n".join(
        f"COMP_WORDS=({line} {word!r}); COMP_CWORD={len(line.split())}; COMPREPLY=(); $function omni; echo ${{COMPREPLY[*]}}"
        for line, word in (("omni", "as"), ("omni ask", "--max"), ("omni embed --precision", "b"))
    )
    script = f"source ~/.bashrc; function=$(complete -p omni | sed 's/.*-F //; s/ .*//')\n{presses}"
    done = subprocess.run(["bash", "-c", script], check=True, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["ask", "--max-new-tokens", "bfloat16"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed: apt-get install zsh")
def test_zsh_completes(tmp_path: Path) -> None:
    env = environment(tmp_path)
    subprocess.run(["zsh", "-c", "omni --install-completion; true"], check=True, env=env, capture_output=True)
    ask = "compadd() { print -r -- ${@[-1]} }; _arguments() { print -r -- $@ }; _describe() { eval 'print -r -- $'$2 }"
    script = f"source ~/.zshrc; autoload +X _omni; {ask}; words=(omni as); CURRENT=2; _omni; _omni_completion"
    done = subprocess.run(["zsh", "-c", script], env=env, capture_output=True, text=True)
    assert "ask" in done.stdout, done.stderr


def test_a_terminal_shows_progress(tmp_path: Path) -> None:
    """A pipe gets the answer alone: `tests/test_cli.py`."""
    shown = on_a_terminal(ASK, environment(tmp_path))
    assert "loading" in shown
    assert shown.rstrip().endswith("red")


def test_no_colour_where_nobody_wants_any(tmp_path: Path) -> None:
    command = ["omni", "inspect", "--help"]
    coloured = re.compile(r"\x1b\[[\d;]*[34]\d")  # bold and faint are no colours
    assert coloured.search(on_a_terminal(command, environment(tmp_path)))
    assert not coloured.search(on_a_terminal(command, environment(tmp_path, NO_COLOR="1")))
    piped = subprocess.run(command, check=True, env=environment(tmp_path), capture_output=True, text=True)
    assert "\x1b" not in piped.stdout


def test_scripts_can_have_json_of_every_command_that_says_something() -> None:
    commands = dict(typer.main.get_command(app).commands)
    commands |= commands.pop("checkpoint").commands
    without = {
        name for name, command in commands.items() if "--json" not in [o for p in command.params for o in p.opts]
    }
    assert without <= {"train", "serve", "app"}
