"""Odd command lines: paths without a file, folders without a model, full disks, bytes that are not text.

A process that has imported omni forks for each command line, so a thousand take minutes. A command may end with status 0
or 1, or with status 2 and either a sentence that begins with `Error: ` or the usage of its options. A traceback, a signal
and a minute without progress are failures.
"""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from campaigns.tally import Tally

SECONDS = 60
"""A command that does nothing for so long hangs."""
MEMORY = 6 << 30
"""The most address space that a command may take, in bytes."""
ROOT = Path(__file__).resolve().parents[1]


def run(seed: int, count: int, seconds: float) -> Tally:
    """Try `count` command lines, or as many as fit into the time."""
    import torch

    import omni.cli.app  # noqa: F401 - imported once, before the forks
    from omni import evaluation  # noqa: F401
    from omni.fusion.modeling_omni import OmniForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)  # a forked process has no other threads
    end, draw = time.monotonic() + seconds, random.Random(seed)
    counts = {"refused": 0, "unchanged": 0}
    failures: list[str] = []
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        make_odd_files(here)
        while tried < count and time.monotonic() < end:
            arguments, full = command_line(draw)
            outcome = _try(arguments, full, here)
            tried += 1
            if outcome in counts:
                counts[outcome] += 1
            else:
                shown = shlex.join(each if len(each) < 80 else f"{each[:60]}... ({len(each)})" for each in arguments)
                failures.append(f"seed {seed}, omni {shown}{' > /dev/full' if full else ''}: {outcome}")
    return Tally(tried, counts["refused"], counts["unchanged"], tuple(failures))


def make_odd_files(here: Path) -> None:
    """Write the files that the command lines name, and link to the shipped ones."""
    for name in ("checkpoints", "configs", "examples"):
        (here / name).symlink_to(ROOT / name)
    (here / "empty").mkdir()
    (here / "empty.json").touch()
    (here / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (here / "number.json").write_text("7")
    (here / "surrogate.jsonl").write_text('{"image": "examples/scene.png", "caption": "\\ud83d"}\n')
    (here / "utf16.csv").write_bytes("image,text\nexamples/scene.png,x\n".encode("utf-16"))
    (here / "long.csv").write_text(f"image,text\nexamples/scene.png,{'x' * 200_000}\n")
    (here / "good.jsonl").write_text('{"image": "examples/scene.png", "caption": "a scene"}\n')
    (here / "text.png").write_text("hello")
    (here / "cut.jpg").write_bytes((ROOT / "examples" / "scene.jpg").read_bytes()[:3000])
    (here / "zeros.bin").write_bytes(bytes(4096))
    (here / "cut.wav").write_bytes(
        b"RIFF\x24\x10\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\0\x10\0\0" + bytes(99)
    )
    (here / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    os.mkfifo(here / "fifo.gguf")
    (here / "both.jsonl").write_text(
        '{"image": "examples/scene.png", "audio": "cut.wav", "question": "x", "answer": "y"}\n'
    )
    (here / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    os.mkfifo(here / "fifo")
    os.mkfifo(here / "fifo.png")
    os.mkfifo(here / "fifo.jsonl")
    (here / "round").symlink_to("round")
    (here / "nowhere.png").symlink_to("gone.png")
    (here / "zero.png").symlink_to("/dev/zero")
    odd = {
        "modalities a number": {"model_type": "omni", "modalities": 3},
        "size negative": {"model_type": "omni_vision", "image_size": -16},
        "size huge": {"model_type": "omni_vision", "hidden_size": 10**12, "num_attention_heads": 1},
        "unknown type": {"model_type": "no_such"},
        "type a list": {"model_type": []},
        "plain": {},
    }
    for name, config in odd.items():
        folder = here / "models" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    folder = here / "models" / "apart"
    shutil.copytree(ROOT / "checkpoints" / "omni_tiny", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"parts_from": {"language_model": "../round", "x": 7}}))
    shutil.copytree(ROOT / "checkpoints" / "vision_tiny", here / "models" / "fifo_weights")
    (here / "models" / "fifo_weights" / "model.safetensors").unlink()
    os.mkfifo(here / "models" / "fifo_weights" / "model.safetensors")


ROWS = [
    {}, {"image": None, "caption": "x"}, {"image": 7, "caption": "x"},
    {"image": {"bytes": None, "path": "x"}, "caption": "x"},
    {"image": ["examples/scene.png"] * 300, "caption": "x"}, {"audio": "examples/scene.png", "text": "x"},
    {"image": "examples/scene.png", "question": "<image>" * 40, "answer": "x"}, {"image": "../" * 99, "caption": "x"},
    {"image": "examples/scene.png", "messages": [{"role": "user", "content": [{"type": "video"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "fifo"}]}, {"role": "assistant", "content": "x"}]},
    {"image": "examples/scene.png", "caption": "x" * 100_000}, {"image": "examples/scene.png", "caption": "\udcff"},
    {"file_name": "fifo.png", "text": "x"}, {"image": "http://x/a.png", "caption": "x"},
    {"image": "zero.png", "caption": 1e400},
]  # fmt: skip
"""Rows of a data set; an error names the line of a wrong row."""
FILES = [
    "examples/scene.png", "examples/scene.jpg", "examples", "empty", "empty.json", "deep.json", "number.json",
    "good.jsonl",
    "surrogate.jsonl", "utf16.csv", "long.csv", "cut.wav", "model.gguf",
    "fifo.gguf", "both.jsonl", "odd.jsonl", "odd.jsonl", "text.png", "cut.jpg", "zeros.bin", "fifo", "fifo.png",
    "fifo.jsonl", "round", "round/x.png", "nowhere.png", "zero.png", "nowhere", "", " ", ".",
    "x" * 5000, "x" * 5000 + ".png",
    "examples/scene.png/x", "C:\\pictures\\a.png", "a\nb.png", "\udcff.png", "--", "-", "*.png", "**", "[", "http://x/a.png",
    "file:" + "//" + "/etc/passwd", "/dev/null", "/proc/self/mem", "/dev/full", "~nobody/x",
]  # fmt: skip
MODELS = [
    "checkpoints/omni_tiny", "checkpoints/vision_tiny", "models/modalities_a_number", "models/size_negative",
    "models/apart", "models/size_huge", "models/unknown_type", "models/type_a_list", "models/plain", "models/fifo_weights",
    "configs", *FILES,
]  # fmt: skip
OUTPUTS = [
    "out", "out.png", "out.parquet", "out.json", "out.html", "examples/scene.png/out.parquet", "empty", "round",
    "round/out.png", "/dev/full", "/proc/out.png", "/nowhere/out.png", "x" * 300, "x" * 5000 + ".png", "", ".", "\udcff.png",
    "good.jsonl/x.png",
]  # fmt: skip
NUMBERS = ["0", "1", "-1", "2", "1e9", "99999999999999999999", "nan", "", "x", "0x10", "1.5", "2147483648"]
WORDS = [
    "what color is the circle", "", " ", "\udcff", "\ud83d", "<image>", "x" * 5000, "is\0it", "\x1b[31m", "-", "--json",
    "examples/scene.png", "\u200b", "[" * 1000,
]  # fmt: skip
HOSTS = [
    "",
    " ",
    "no such host",
    "256.256.256.256",
    "::1::",
    "x" * 300,
    "http://x",
    "\udcff",
    "localhost:1",
    "0.0.0.0.0",
]
SETTINGS = [
    "train.path=good.jsonl", "output=out", "arguments.max_steps=0", "arguments.seed=-1", "optimizer.lr=nan", "x", "=", "a=",
    "train=null", "evaluate=null", "model.checkpoint=nowhere", "arguments.max_steps=[]", "train.path=" + "x" * 5000,
    "optimizer.lr=1e400", "output=/dev/full", "output=examples/scene.png/x", "optimizer.name=\udcff",
]  # fmt: skip
RECIPES = [
    "configs/train_pictures.json", "configs/train_lora.json", "configs/train_omni_scenes.json", "configs/contrastive.json",
    *FILES,
]  # fmt: skip

Draw = random.Random
Part = Callable[[Draw], list[str]]


def one(of: list[str]) -> Part:
    """A part that is one of these words."""
    return lambda draw: [draw.choice(of)]


def few(of: list[str], most: int = 3) -> Part:
    """A part that is up to `most` of these words."""
    return lambda draw: [draw.choice(of) for _ in range(draw.randrange(most + 1))]


def option(name: str, of: list[str] | None = None, chance: float = 0.3) -> Part:
    """A part that is, with this chance, an option with one of these values."""

    def part(draw: Draw) -> list[str]:
        if draw.random() > chance:
            return []
        return [name, *([draw.choice(of)] if of is not None else [])]

    return part


JSON = option("--json")
COMMANDS: dict[str, list[Part]] = {
    "ask": [few(FILES), few(WORDS, 1), option("--checkpoint", MODELS), option("--max-new-tokens", NUMBERS), JSON],
    "attend": [
        few(FILES, 2), few(WORDS, 1), option("--output", OUTPUTS, 0.8), option("--checkpoint", MODELS),
        option("--layer", NUMBERS), JSON,
    ],
    "embed": [
        few(FILES), option("--output", OUTPUTS, 0.9), option("--checkpoint", MODELS), option("--what", ["cls", "grid", "x"]),
        option("--batch-size", NUMBERS), option("--shard-rows", NUMBERS), option("--resume"), JSON,
    ],
    "inspect": [few(MODELS, 1), option("--image-size", NUMBERS), option("--batch", NUMBERS), JSON],
    "modalities": [JSON, few(WORDS, 1)],
    "compose": [
        few(OUTPUTS, 1), option("--image", MODELS, 0.6), option("--audio", MODELS, 0.6), option("--thinker", MODELS, 0.8),
        option("--factor", NUMBERS), option("--factor", ["image=0", "audio=x", "=2", "x=3"]), option("--apart"),
        option("--projector", ["mlp", "x", "image=linear", "audio=", "image=mlp=mlp"]), JSON,
    ],
    "train": [few(RECIPES, 1), option("--set", SETTINGS, 0.9), option("--set", SETTINGS, 0.9), option("--resume")],
    "evaluate": [
        few(MODELS, 1), option("--data", FILES, 0.8), option("--pictures", ["1", "0", "-1", "x"], 1),
        option("--fit-pictures", ["1", "x"], 1), option("--output", OUTPUTS),
        option("--answers", OUTPUTS), option("--sheet", OUTPUTS), option("--card", FILES), option("--verify", FILES), JSON,
    ],
    "convert": [few(FILES), few(OUTPUTS, 1), option("--to", ["micro-omni", "omni", "x"]), JSON],
    "check-plugin": [
        few(["omni-nothing", "json", "omni.cli", "x:y", "image:x", "os:path", ":", "", "\udcff", "x" * 5000], 2),
        option("--file", FILES), option("--config", FILES, 0.5), JSON,
    ],
    "checkpoint": [
        one(["merge", "merge", "seal", "x"]), few(MODELS[2:], 1), few(OUTPUTS, 1), option("--dtype", ["x", "float32"]), JSON,
    ],
    "checkpoint familiarise": [
        few(MODELS[2:], 1), option("--recipe", RECIPES, 0.5), option("--data", FILES, 0.5), option("--held-out", FILES),
        option("--set", SETTINGS), option("--rows", NUMBERS), JSON,
    ],
    "export": [few(MODELS[1:], 1), few(OUTPUTS, 1), JSON],
    "serve": [few(FILES, 1), option("--host", HOSTS, 1), option("--port", ["0", "-1", "70000", "x"], 0.9)],
    "app": [few(FILES, 1), option("--host", HOSTS, 1), option("--port", ["0", "-1", "70000", "x"], 0.9)],
    "check-data": [
        few(FILES, 1), option("--test", FILES), option("--checkpoint", MODELS), option("--max-length", NUMBERS),
        option("--root", FILES), option("--prompt", WORDS), JSON,
    ],
    "search": [
        few([*OUTPUTS, *FILES], 1), option("--like", FILES, 0.6), option("--text", WORDS), option("--most", NUMBERS),
        option("--checkpoint", MODELS), option("--sheet", OUTPUTS), JSON,
    ],
    "duplicates": [few([*OUTPUTS, *FILES], 1), option("--least", NUMBERS), option("--sheet", OUTPUTS), JSON],
    "teach": [
        few(MODELS, 1), option("--image", MODELS, 0.8), option("--audio", MODELS), option("--output", OUTPUTS, 0.9),
        option("--data", FILES, 0.8), option("--test", FILES), option("--prompt", WORDS), option("--text", FILES),
        option("--minutes", [*NUMBERS, "0.01"]), option("--set", SETTINGS), option("--resume"), JSON,
    ],
    "bench": [
        one(["--verify"]), few(WORDS[1:], 1), option("--pictures", ["1", "0", "-1", "x"], 1),
        option("--checkpoint", MODELS),
    ],
    "no such command": [few(WORDS, 2)],
}  # fmt: skip


def command_line(draw: Draw) -> tuple[list[str], bool]:
    """The arguments of a command, and whether it prints to a full disk."""
    command = draw.choice(list(COMMANDS))
    words = [word for part in COMMANDS[command] for word in part(draw)]
    return [*command.split(), *(word.replace("\0", "") for word in words)], draw.random() < 0.1


def _try(arguments: list[str], full: bool, here: Path) -> str:
    """The outcome of a command line: "unchanged", "refused", or what is wrong."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become(arguments, full, here, output.fileno())
        status = _wait(child)
        output.seek(0)
        text = output.read().decode(errors="replace")
    for name in OUTPUTS[:5]:  # so that the next command finds none of it
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if status is None:
        return f"silent for {SECONDS} s"
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.waitstatus_to_exitcode(status)
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:200]}"
    if code in (0, 1):
        return "unchanged"
    if code == 2 and ("Error: " in text or "Usage: " in text):
        return "refused"
    return f"status {code}: {text.strip()[-200:]}"


def _become(arguments: list[str], full: bool, here: Path, said: int) -> None:
    """Be the command; does not return."""
    from omni.cli.app import main

    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.setsid()
        os.chdir(here)
        os.dup2(said, 2)
        os.dup2(os.open("/dev/full", os.O_WRONLY) if full else said, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
        socket.setdefaulttimeout(5)
        sys.argv = ["omni", *arguments]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    """The status of a process; None if it hung and was killed."""
    end, worked = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        with suppress(OSError):
            used = sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
            if used > worked and used < 100 * os.sysconf("SC_CLK_TCK"):  # slow on a busy machine, but it works
                end, worked = time.monotonic() + SECONDS, used
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
