"""vLLM itself: its answers are ours, and a prompt that cannot be right harms nobody else.

OMNI_VLLM_PYTHON names the Python of an environment of vLLM's own; docs/export.md says how to make one. omni comes from here.
"""

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("OMNI_VLLM_PYTHON")
SERVE = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    checkpoint, asked, answered, length = sys.argv[1:]
    engine = LLM(checkpoint, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8)
    openers = {"image": Image.open, "audio": lambda path: (np.load(path), 16_000)}
    said = []
    for prompts in json.loads(Path(asked).read_text()):  # all of a list at once
        requests = []
        for text, items in prompts:
            data = {name: [openers[name](path) for path in paths] for name, paths in items.items() if paths}
            requests.append({"prompt": text, **({"multi_modal_data": data} if data else {})})
        outputs = engine.generate(requests, SamplingParams(temperature=0, max_tokens=int(length)), use_tqdm=False)
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


def serve(checkpoint: Path, asked: list[Any], length: int, environment: dict[str, str], folder: Path) -> list[Any]:
    """The tokens that vLLM writes, for each list of prompts."""
    script, asking, answered = folder / "serve.py", folder / "asked.json", folder / "answered.json"
    script.write_text(SERVE)
    asking.write_text(json.dumps(asked))
    command = [str(PYTHON), str(script), str(checkpoint), str(asking), str(answered), str(length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    said: list[Any] = json.loads(answered.read_text())
    return said


@pytest.mark.long
@pytest.mark.skipif(PYTHON is None, reason="OMNI_VLLM_PYTHON names no Python with vLLM")
def test_vllm_answers_as_we_do_whatever_others_ask(environment: dict[str, str], tmp_path: Path) -> None:
    from omni import scenes
    from omni.data.conversations import ask
    from omni.loading.checkpoint import load
    from omni.questions import make_prompts

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
            prompts.append((text, {"image": [str(path)]}))
            inputs = make_prompts(processor, [(question.text, [picture])])
            written = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            expected.append(written.tolist())
    text, items = prompts[0]
    bad = [(text, {}), (text.replace("<image>", "<image><image>"), items)]
    asked = [prompts, bad, [prompts[0], *bad, prompts[1]], prompts]
    first, _, beside, again = serve(checkpoint, asked, 24, environment, tmp_path)
    assert first == expected
    assert [beside[0], beside[-1]] == expected[:2]
    assert again == expected


@pytest.mark.long
@pytest.mark.skipif(PYTHON is None, reason="OMNI_VLLM_PYTHON names no Python with vLLM")
def test_vllm_hears_as_we_do(environment: dict[str, str], tmp_path: Path) -> None:
    """Sounds of different lengths, several in a prompt, beside pictures; the weights are random."""
    import numpy as np
    import torch
    from PIL import Image

    from omni import OmniConfig, OmniFeatureExtractor, OmniForConditionalGeneration, OmniImageProcessor, OmniProcessor
    from omni.training.tokenizer import train_tokenizer

    tokens = {"image": "<image>", "audio": "<audio>"}
    tokenizer = train_tokenizer(["what is that", "which of them"] * 4, 300, tokens)
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoders = {
        "image": {"model_type": "omni_vision", "image_size": 16, "patch_size": 8, **size},
        "audio": {"model_type": "omni_audio", "num_mel_bins": 20, **size},
    }
    sections = {
        name: {"encoder": encoder, "projector": "mlp", "token_id": tokenizer.convert_tokens_to_ids(tokens[name])}
        for name, encoder in encoders.items()
    }
    thinker = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    thinker |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    thinker |= {"max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities=sections, text_config=thinker)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    processor = OmniProcessor(
        OmniImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        feature_extractor=OmniFeatureExtractor(num_mel_bins=20),
        modalities=model.config.modalities,
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    sounds = []
    for number, length in enumerate((8_000, 3_000, 8_000, 12_345)):
        wave = 0.3 * np.sin(np.arange(length) * (0.1 + 0.05 * number))
        sounds.append(str(tmp_path / f"{number}.npy"))
        np.save(sounds[-1], wave.astype(np.float32))
    picture = str(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)).save(picture)
    asked: list[tuple[str, dict[str, list[str]]]] = [
        ("<audio>what is that", {"audio": sounds[:1]}),
        ("<image><audio>which of them", {"image": [picture], "audio": sounds[1:2]}),
        ("<audio>what<audio>", {"audio": sounds[2:]}),
        ("<audio>what<audio>", {"audio": [sounds[0], sounds[2]]}),
        ("<image>what", {"image": [picture]}),
        ("what", {}),
    ]
    asked = [(f"<|user|>{text}<|assistant|>", items) for text, items in asked]
    expected = []
    for text, items in asked:
        given = {
            "images": [Image.open(path) for path in items.get("image", [])] or None,
            "audio": [(np.load(path), 16_000) for path in items.get("audio", [])] or None,
        }
        inputs = processor(text=text, return_tensors="pt", **given)
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(written.tolist())
    together, *alone = serve(tmp_path / "model", [asked, *([each] for each in asked)], 8, environment, tmp_path)
    assert together == expected
    assert [answer for (answer,) in alone] == expected
