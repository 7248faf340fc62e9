"""vLLM itself: its answers are ours, and a prompt that cannot be right harms nobody else.

OMNI_VLLM_PYTHON names the Python of an environment of vLLM's own; docs/export.md says how to make one. omni comes from here.
"""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("OMNI_VLLM_PYTHON")
SERVE = """
import json, sys
from pathlib import Path
from PIL import Image

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    checkpoint, asked, answered = sys.argv[1:]
    engine = LLM(checkpoint, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8)
    said = []
    for prompts in json.loads(Path(asked).read_text()):  # all of a list at once
        requests = [
            {"prompt": text, **({"multi_modal_data": {"image": [Image.open(path) for path in paths]}} if paths else {})}
            for text, paths in prompts
        ]
        outputs = engine.generate(requests, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        said.append([list(output.outputs[0].token_ids) for output in outputs])
    Path(answered).write_text(json.dumps(said))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process in which omni is installed, as far as its entry points go."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "installed" / f"omni_thinker-{project['version']}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: omni-thinker\nVersion: {project['version']}\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["vllm.general_plugins"].items()]
    (installed / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    path = os.pathsep.join([str(ROOT), str(installed.parent)])
    return {**os.environ, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.mark.long
@pytest.mark.skipif(PYTHON is None, reason="OMNI_VLLM_PYTHON names no Python with vLLM")
def test_vllm_answers_as_we_do_whatever_others_ask(environment: dict[str, str], tmp_path: Path) -> None:
    from omni import scenes
    from omni.data.conversations import ask
    from omni.loading.checkpoint import load
    from omni.session import make_prompts

    assert PYTHON is not None
    checkpoint = ROOT / "checkpoints" / "omni_tiny"
    model, processor = load(checkpoint)
    prompts, expected = [], []
    for seed in range(8):
        scene = scenes.sample_scene(seed, "test")
        picture, path = scenes.render(scene), tmp_path / f"{seed}.png"
        picture.save(path)
        for question in scenes.questions(scene, seed, 3):
            chat = ask(question.text)
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompts.append((text, [str(path)]))
            inputs = make_prompts(processor, [(question.text, [picture])])
            written = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            expected.append(written.tolist())
    text, paths = prompts[0]
    bad = [(text, []), (text.replace("<image>", "<image><image>"), paths)]
    script, asked, answered = tmp_path / "serve.py", tmp_path / "asked.json", tmp_path / "answered.json"
    script.write_text(SERVE)
    asked.write_text(json.dumps([prompts, bad, [prompts[0], *bad, prompts[1]], prompts]))
    done = subprocess.run(
        [PYTHON, script, checkpoint, asked, answered], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, beside, again = json.loads(answered.read_text())
    assert first == expected
    assert [beside[0], beside[-1]] == expected[:2]
    assert again == expected
