"""The command with real files and the shipped checkpoint: what it prints, and what it says about mistakes."""

import json
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.checkpoints.seal import reseal

from .conftest import invoke, one_sentence, refuse, succeed

OMNI = Path(sys.executable).with_name("omni")
CHECKPOINT = Path("checkpoints/omni_tiny")
SCENE = Path("examples/scene.png")
QUESTION = "what color is the circle"
COMMANDS = (
    "ask",
    "attend",
    "inspect",
    "modalities",
    "train",
    "evaluate",
    "convert",
    "bench",
    "check-data",
    "check-plugin",
)


def start(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    return subprocess.run([OMNI, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


# --- Asking -----------------------------------------------------------------------------------------------------------


def test_the_command_answers(python: Callable[..., Any]) -> None:
    done = python("-m", "omni", "ask", SCENE, QUESTION)
    assert (done.returncode, done.stdout) == (0, "red\n"), done.stderr


def test_nothing_but_json_is_printed_for_scripts(python: Callable[..., Any]) -> None:
    done = python("-m", "omni", "ask", SCENE, QUESTION, "--json")
    answer = json.loads(done.stdout)
    assert answer["answer"] == "red"
    assert answer["question"] == QUESTION
    assert answer["checkpoint"] == str(CHECKPOINT)
    assert answer["complete"] is True
    assert answer["tokens_read"] > 50
    assert answer["tokens_written"] == 2
    assert list(answer["seconds"]) == ["loading", "preparing", "encoding", "reading", "writing"]
    assert done.stderr == ""


def test_the_shipped_checkpoint_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = SCENE.resolve()
    monkeypatch.chdir(tmp_path)
    assert succeed("ask", picture, QUESTION) == "red\n"


def save(name: str, image: Image.Image, **options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    return write


def rotated() -> tuple[Image.Image, Image.Exif]:
    """The scene as a camera on its side stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return scene().transpose(Image.Transpose.ROTATE_90), exif


def scene() -> Image.Image:
    return Image.open(SCENE).convert("RGB")


def with_alpha() -> Image.Image:
    picture = scene().convert("RGBA")
    picture.putalpha(255)
    return picture


COLOURED = {
    "png": save("a.png", scene()),
    "jpeg": save("a.jpg", scene(), quality=95),
    "webp": save("a.webp", scene(), quality=95),
    "gif": save("a.gif", scene(), save_all=True, append_images=[Image.new("RGB", (224, 224))]),
    "bmp": save("a.bmp", scene()),
    "tiff": save("a.tiff", scene()),
    "palette": save("a.png", scene().quantize(256)),
    "rgba": save("a.png", with_alpha()),
    "cmyk": save("a.jpg", scene().convert("CMYK"), quality=95),
    "exif": save("a.jpg", rotated()[0], exif=rotated()[1], quality=95),
    "wrong suffix": save("a.txt", scene(), format="PNG"),
    "name with spaces": save("a picture ü.png", scene()),
    "50 megapixels": save("a.jpg", scene().resize((10_000, 5_000), Image.Resampling.NEAREST), quality=80),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_the_same_scene_in_any_format_gets_the_same_answer(kind: str, tmp_path: Path) -> None:
    assert succeed("ask", COLOURED[kind](tmp_path), QUESTION) == "red\n"


COLOURLESS = {
    "grey": save("a.png", scene().convert("L")),
    "one bit": save("a.png", scene().convert("1")),
    "16 bit": save("a.png", Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257)),
    "one pixel": save("a.png", Image.new("RGB", (1, 1), "red")),
    "a line": save("a.png", Image.new("RGB", (3000, 1), "red")),
}


@pytest.mark.parametrize("kind", COLOURLESS)
def test_pictures_without_colour_or_size_are_answered_too(kind: str, tmp_path: Path) -> None:
    result = json.loads(succeed("ask", COLOURLESS[kind](tmp_path), "how many objects are there", "--json"))
    assert result["tokens_written"] > 0


def test_several_pictures() -> None:
    one = json.loads(succeed("ask", SCENE, QUESTION, "--json"))["tokens_read"]
    two = json.loads(succeed("ask", SCENE, "examples/second.png", QUESTION, "--json"))["tokens_read"]
    assert two == one + 50


@pytest.mark.new_chats
def test_words_that_look_like_control_tokens_are_plain_text() -> None:
    result = json.loads(succeed("ask", SCENE, "what is <image> and <|end|>?", "--json"))
    assert result["question"] == "what is <image> and <|end|>?"


def test_an_answer_is_stopped_and_says_so() -> None:
    result = json.loads(succeed("ask", SCENE, "describe the picture", "--max-new-tokens", 2, "--json"))
    assert result["tokens_written"] == 2
    assert result["complete"] is False


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_sentence_in_a_real_process(tmp_path: Path) -> None:
    done = start("ask", tmp_path / "nothing.png", QUESTION)
    assert "nothing.png' does not exist" in one_sentence(done.returncode, done.stdout, done.stderr)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    def file(content: bytes) -> Path:
        (tmp_path / "file.png").write_bytes(content)
        return tmp_path / "file.png"

    whole, photo = SCENE.read_bytes(), Path("examples/scene.jpg").read_bytes()
    huge = whole[:16] + (100_000).to_bytes(4, "big") * 2 + whole[24:]
    assert "is empty" in refuse("ask", file(b""), QUESTION)
    assert "is not a picture" in refuse("ask", file(b"hello"), QUESTION)
    assert "a web page" in refuse("ask", file(b"<!doctype html>"), QUESTION)
    assert "too large" in refuse("ask", file(huge), QUESTION) or "damaged" in refuse("ask", file(huge), QUESTION)
    assert "end too early" in refuse("ask", file(whole[: len(whole) // 2]), QUESTION)
    assert "end too early" in refuse("ask", file(photo[: len(photo) // 2]), QUESTION)
    assert "is a folder" in refuse("ask", tmp_path, QUESTION)
    assert "is an address" in refuse("ask", "https://example.org/a.png", QUESTION)
    assert "is a folder" in refuse("ask", SCENE, tmp_path, QUESTION)


def test_a_picture_of_more_than_50_megapixels(tmp_path: Path) -> None:
    Image.new("1", (50_001, 1_000)).save(tmp_path / "large.png")
    assert "too large, expected at most 50,000,000 pixels" in refuse("ask", tmp_path / "large.png", QUESTION)


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_an_empty_question(question: str) -> None:
    assert "The question is empty" in refuse("ask", SCENE, question)


def test_a_question_in_broken_bytes() -> None:
    assert "not valid Unicode" in refuse("ask", SCENE, "caf\udce9")


def test_a_question_or_a_picture_left_out() -> None:
    assert "or a sound that asks, found the file 'examples/scene.png'; add one of them" in refuse("ask", SCENE)
    assert "found only ''" in refuse("ask")
    assert f"found only '{QUESTION}'; name a file" in refuse("ask", QUESTION)


def test_more_pictures_than_the_model_can_read() -> None:
    assert "pass fewer of them" in refuse("ask", *[SCENE] * 60, QUESTION)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "copy", ignore=shutil.ignore_patterns("run")))


def test_unknown_checkpoints(tmp_path: Path) -> None:
    assert "'nowhere' does not exist" in refuse("ask", SCENE, QUESTION, "--checkpoint", "nowhere")
    assert "has no config.json" in refuse("ask", SCENE, QUESTION, "--checkpoint", tmp_path)
    assert "is a file" in refuse("ask", SCENE, QUESTION, "--checkpoint", CHECKPOINT / "config.json")
    encoder = refuse("ask", SCENE, QUESTION, "--checkpoint", "checkpoints/vision_tiny")
    assert "of type 'omni_vision', which does not answer questions" in encoder


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_a_cut_off_file_of_a_checkpoint(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refuse("ask", SCENE, QUESTION, "--checkpoint", copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_missing_file_of_a_checkpoint(copy: Path, name: str) -> None:
    (copy / name).unlink()
    result = invoke("ask", SCENE, QUESTION, "--checkpoint", copy)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: The checkpoint ")


def test_a_checkpoint_with_untrained_parts(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text()) | {"untrained": ["image_projector"]}
    (copy / "config.json").write_text(json.dumps(values))
    reseal(copy)
    (copy / "model.safetensors").unlink()  # it is said before anything large is read
    assert "image_projector is untrained" in refuse("ask", SCENE, QUESTION, "--checkpoint", copy)


# --- Inspecting, modalities, training ---------------------------------------------------------------------------------


def test_inspect() -> None:
    table = succeed("inspect", "checkpoints/vision_tiny")
    assert "916,992" in table
    assert "scores" in table
    assert "scores" not in succeed("inspect", "checkpoints/vision_tiny", "--depth", 0)
    report = json.loads(succeed("inspect", CHECKPOINT, "--image-size", "320x160", "--batch", 2, "--json"))
    assert (report["image_size"], report["batch_size"], report["parameters"]) == ([320, 160], 2, 916_992)


def test_inspect_refuses() -> None:
    assert "does not exist; expected a checkpoint folder or a JSON configuration" in refuse("inspect", "nowhere")
    assert "is not JSON" in refuse("inspect", "pyproject.toml")
    assert "Expected an image size such as 224 or 320x160" in refuse(
        "inspect", "checkpoints/vision_tiny", "--image-size", "large"
    )
    assert "multiples of the patch size 16" in refuse("inspect", "checkpoints/vision_tiny", "--image-size", 225)
    assert "at most 99,999 pixels" in refuse("inspect", "checkpoints/vision_tiny", "--image-size", "9" * 20)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with a pipe, a device, and JSON that is nested endlessly."""
    for suffix in ("", ".json", ".pt", ".gguf", ".safetensors"):
        os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "huge.json").write_text(
        '{"model_type": "omni_vision", "hidden_size": 1000000000000, "num_attention_heads": 1}'
    )
    return tmp_path


@pytest.mark.parametrize(
    "command",
    ["inspect {0}/fifo", "inspect {0}/zero.json", "inspect {0}/deep.json", "inspect {0}/huge.json", "train {0}/fifo.json",
     "train {0}/zero.json", "train {0}/deep.json", "convert {0}/fifo.pt {0}/out", "convert {0}/fifo.gguf {0}/out",
     "convert {0}/fifo.safetensors {0}/out", "convert {0}/fifo.json {0}/out", "check-plugin image --config {0}/deep.json",
     "check-data {0}/fifo.json", "evaluate checkpoints/omni_tiny --verify {0}/fifo.json"],
)  # fmt: skip
def test_no_command_waits_for_a_pipe_or_fails_over_a_document(odd: Path, command: str) -> None:
    assert len(refuse(*command.format(odd).split())) < 1000


def test_modalities() -> None:
    assert "image  entry point omni.vision.plugin:image" in succeed("modalities")
    assert json.loads(succeed("modalities", "--json"))["image"].endswith(" of omni")


def test_train_refuses(tmp_path: Path) -> None:
    recipe = "configs/train_omni_scenes.json"
    (tmp_path / "list.json").write_text("[]")
    assert "'nowhere.json' cannot be read: No such file" in refuse("train", "nowhere.json")
    assert "'pyproject.toml' is not JSON" in refuse("train", "pyproject.toml")
    assert "should be a JSON object, found a list" in refuse("train", tmp_path / "list.json")
    assert "key=value" in refuse("train", recipe, "--set", "optimizer.lr")
    misspelt = refuse("train", recipe, "--set", "optimizer.learning_rate=1")
    assert "optimizer: unknown 'learning_rate'; what can be set here is name, lr, weight_decay, lr_scale." in misspelt
    assert "optimizer.lr: Input should be a valid number" in refuse("train", recipe, "--set", "optimizer.lr=fast")
    assert "knows no 'max_step'" in refuse("train", recipe, "--set", "arguments.max_step=1")


def test_a_file_in_the_place_of_a_question_is_refused(tmp_path: Path) -> None:
    said = {
        "examples/second.png": "or a sound that asks, found the file 'examples/second.png'; add one of them",
        "README.md": "'README.md' is not a sound that can be read",
        "nowhere.jpg": "'nowhere.jpg' does not exist",
    }
    for file, sentence in said.items():
        assert sentence in refuse("ask", SCENE, file)


def test_a_cut_answer_says_so() -> None:
    done = invoke("ask", SCENE, "describe the picture", "--max-new-tokens", 3)
    assert done.exit_code == 0
    assert len(done.stdout.split()) <= 3
    assert done.stderr == "The answer was cut after 3 tokens; raise --max-new-tokens for the rest.\n"
    assert invoke("ask", SCENE, "describe the picture").stderr == ""


def test_a_new_run_where_one_was_to_be_resumed_says_so(tmp_path: Path) -> None:
    done = invoke("train", "configs/train_omni_scenes.json", "--resume", "--set", f"output={tmp_path}")
    assert f"Nothing to resume in {tmp_path}, so this is a new run." in done.stderr
    assert done.exit_code == 2  # its encoder does not exist


def test_an_evaluation_loses_none_of_its_files(tmp_path: Path) -> None:
    evaluate = ("evaluate", CHECKPOINT, "--pictures", 1)
    twice = tmp_path / "result.json"
    assert "would be written twice" in refuse(*evaluate, "--output", twice, "--answers", twice)
    assert "Expected the name of a file, but" in refuse(*evaluate, "--output", tmp_path)


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": str(SCENE.absolute()), "text": "x"}) + "\n")
    for prompt in ("", " "):
        assert "The prompt is empty" in refuse("evaluate", CHECKPOINT, "--data", rows, "--prompt", prompt)
        assert "The prompt is empty" in refuse("check-data", rows, "--prompt", prompt)


def test_train_does_not_overwrite_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    output = f"output={json.dumps(str(tmp_path))}"
    assert "resume it, or remove the folder" in refuse("train", "configs/train_omni_scenes.json", "--set", output)


@pytest.mark.parametrize(
    ("recipe", "key", "value", "reason"),
    [
        ("omni_scenes", "model.thinker", "nowhere.json", "No such file"),
        (
            "omni_scenes",
            "model.thinker",
            "configs/vision_tiny.json",
            "expected the JSON configuration of a language model",
        ),
        ("omni_scenes", "model.thinker", "README.md", "Expecting value"),
        ("omni_scenes", "model.image.encoder", "nowhere", "does not exist; expected the folder of a saved model"),
        ("omni_scenes", "model.image.encoder", "configs", "has no config.json; expected the folder of a saved model"),
        ("pictures", "model.checkpoint", "nowhere", "does not exist; expected the folder of a saved model"),
        ("pictures", "model.checkpoint", "checkpoints/vision_tiny", "holds a model of type 'omni_vision'; name"),
        ("projector", "model.image", {"projector": "mpl"}, "Unknown projector 'mpl' for 'image'; known: "),
        ("contrastive", "model.encoder", "README.md", "is a file; expected the folder of a saved model"),
        ("contrastive", "model.text", {"model_type": "brt"}, "brt"),
        ("vision_tiny", "model.encoder", "nowhere", "does not exist; expected the folder of a saved model"),
        ("vision_scenes", "model.config", {"hidden_sise": 32}, "Unknown key 'hidden_sise' for OmniVisionConfig"),
    ],
)
def test_what_a_recipe_names_must_be_there(recipe: str, key: str, value: Any, reason: str, tmp_path: Path) -> None:
    changes = {key: value, "output": str(tmp_path), "train": {"split": "train", "count": 4}}
    settings = [f"{name}={json.dumps(changed)}" for name, changed in changes.items()]
    result = invoke("train", f"configs/train_{recipe}.json", *(part for each in settings for part in ("--set", each)))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: Correct `{key}` of the recipe, as {value!r} cannot be used: " in result.stderr
    assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_worker_of_training_cannot_read_is_one_sentence(tmp_path: Path, python: Callable[..., Any]) -> None:
    whole = SCENE.read_bytes()
    (tmp_path / "whole.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    question = {"question": QUESTION, "answer": "red"}
    rows = {
        "cut": [{"image": "cut.png", **question}],
        "odd": [{"image": "whole.png", "question": "what<|end|>", "answer": "red"}],
        "broken": ["no object"],
    }
    for name, bad in rows.items():
        lines = [json.dumps(row) + "\n" for row in [{"image": "whole.png", **question}, *bad]]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def train(name: str) -> list[str]:
        arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 1, "use_cpu": True}
        changes = {
            "train": {"path": str(tmp_path / f"{name}.jsonl")},
            "evaluate": None,
            "arguments": {**arguments, "save_strategy": "no", "report_to": "none", "remove_unused_columns": False},
            "output": str(tmp_path / name),
        }
        settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return ["train", "configs/train_pictures.json", *(part for each in settings for part in ("--set", each))]

    done = python("-m", "omni", *train("cut"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    cut = tmp_path / "cut.png"
    assert told.startswith(
        f"Error: {tmp_path / 'cut.jsonl'}, line 2: {str(cut)!r} cannot be decoded, expected a whole PNG"
    )
    for name, reason in (
        ("odd", "has '<|end|>' in the text of its user"),
        ("broken", "expected a JSON object, found"),
    ):
        result = invoke(*train(name))
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Traceback" not in result.stderr
        assert f"Error: {tmp_path / name}.jsonl, line 2" in result.stderr.splitlines()[-1]
        assert reason in result.stderr.splitlines()[-1]


# --- The command itself -----------------------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    # of the processor, as the machine may be busy with something else
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["modalities"], ["--version"]], ids=" ".join)
def test_what_needs_no_model_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, omni.cli.app\n"
        "try: omni.cli.app.app(sys.argv[1:])\n"
        "except SystemExit: print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"


def test_wrong_folders_and_files_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    out, gone, here = str(tmp_path / "out"), str(tmp_path / "gone"), "checkpoints/vision_tiny"
    commands = [
        ["ask", str(SCENE), "what", "--checkpoint", gone],
        ["ask", f"{gone}.png", "what"],
        ["attend", str(SCENE), "--checkpoint", gone, "--output", f"{out}.png"],
        ["embed", gone, "--output", f"{out}.parquet"],
        ["embed", here, "--output", f"{gone}/table.parquet"],
        ["embed", here, "--output", f"{out}.parquet", "--checkpoint", str(tmp_path)],
        ["search", gone, "--text", "red"],
        ["duplicates", gone],
        ["inspect", gone],
        ["train", gone],
        ["check-data", gone],
        ["evaluate", gone],
        ["evaluate", here, "--data", gone],
        ["compose", "--image", here, "--thinker", gone, out],
        ["teach", gone, "--image", here, "--output", out],
        ["teach", here, "--image", here, "--output", out, "--data", gone],
        ["convert", gone, out],
        ["export", gone, out],
        ["serve", gone],
        ["app", gone],
        ["checkpoint", "seal", gone],
        ["checkpoint", "merge", gone, out],
        ["checkpoint", "familiarise", gone, "--data", gone],
    ]
    code = (
        "import json, sys, omni.cli.app\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    try: omni.cli.app.app(command)\n"
        "    except SystemExit as end: print(end.code, *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["2"] * len(commands)
    assert done.stderr.count("Error: ") == len(commands)


def test_colours_on_a_terminal_only() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment["TERM"] = "xterm-256color"
    assert "\x1b[" not in start("--help", env=environment).stdout
    terminal, end = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        process = subprocess.Popen([OMNI, "--help"], stdout=end, stderr=end, env=environment)
        os.close(end)
        shown = b""
        while b"modalities" not in shown and (more := screen.read(4096)):
            shown += more
        process.kill()
        process.wait()
    assert b"\x1b[" in shown


def test_every_command_explains_itself() -> None:
    for command in COMMANDS:
        assert "Usage: " in succeed(command, "--help")


def test_version() -> None:
    assert succeed("--version") == f"omni {version('omni-thinker')}\n"


def test_python_m_omni() -> None:
    done = subprocess.run([sys.executable, "-m", "omni", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("omni ")


def test_shell_completion() -> None:
    words = {"_OMNI_COMPLETE": "complete_bash", "COMP_WORDS": "omni ins", "COMP_CWORD": "1"}
    assert start(env=os.environ | words).stdout.split() == ["inspect"]


@pytest.mark.parametrize("arguments", [["ask", SCENE, QUESTION, "--max-new-tokens", 0], ["nothing"], ["ask", "--what"]])
def test_wrong_usage_is_exit_status_2(arguments: list[object]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_a_bug_shows_its_traceback() -> None:
    code = "import omni, omni.cli.app; omni.modalities = None; omni.cli.app.app(['modalities'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "TypeError: 'NoneType' object is not callable" in done.stderr
