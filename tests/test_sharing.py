"""A checkpoint folder on another machine: the code that it names, and the card that goes to the hub with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForImageTextToText

import omni
from omni.checkpoints.cards import MEASURED
from omni.evaluation import evaluate, update_card
from omni.scenes.evaluation import SceneSettings

Pair = Callable[..., tuple[Any, Any]]
ROOT = Path(omni.__file__).parent.parent
SHIPPED = ROOT / "checkpoints/omni_tiny"


# --- trust_remote_code ------------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
fused, encoder, again = sys.argv[1:]
assert "omni" not in sys.modules
processor = AutoProcessor.from_pretrained(fused, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(fused, trust_remote_code=True)
prepare = AutoImageProcessor.from_pretrained(encoder, trust_remote_code=True)
tower = AutoModel.from_pretrained(encoder, trust_remote_code=True)
print(*(type(part).__module__ for part in (processor, model, prepare, tower)))
config = AutoConfig.from_pretrained(fused, trust_remote_code=True)
for name, reference in config.auto_map.items():  # as vLLM and SGLang do
    found = get_class_from_dynamic_module(reference, fused)
    assert not name.startswith("AutoModel") or found.is_backend_compatible()
for part in (model, processor):
    part.save_pretrained(again)
print(*sorted(path.name for path in Path(again).iterdir()))
"""


def python(
    script: str, *arguments: object, home: Path, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, *options, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def folders(make_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fused model and an encoder, as they are saved."""
    fused, encoder = tmp_path_factory.mktemp("fused"), tmp_path_factory.mktemp("encoder")
    model, processor = make_pair()
    for part in (model, processor):
        part.save_pretrained(fused)
    for part in (model.model.image_tower, processor.image_processor):
        part.save_pretrained(encoder)
    return fused, encoder


def test_a_folder_finds_its_classes_without_an_import(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = python(LOAD, *folders, tmp_path / "again", home=tmp_path)
    assert done.returncode == 0, done.stderr
    found, files = done.stdout.splitlines()
    assert found.split() == [
        "omni.fusion.processing_omni",
        "omni.fusion.modeling_omni",
        "omni.vision.image_processing_vision",
        "omni.vision.modeling_vision",
    ]
    assert files.split() == sorted(path.name for path in folders[0].iterdir())  # no source files of omni among them
    for file in ("config.json", "processor_config.json"):
        maps = [json.loads((folder / file).read_text())["auto_map"] for folder in (folders[0], tmp_path / "again")]
        assert maps[0] == maps[1]


def test_without_the_package_it_says_what_to_install(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """-S leaves out the links of editable installs; what else is installed comes back, but for omni itself."""
    found = "import sys; sys.path += [path for path in sys.argv.pop(1).split(':') if path]\n"
    found += "import importlib.util; assert importlib.util.find_spec('omni') is None\n"
    links = tmp_path / "site"
    links.mkdir()
    for folder in {Path(module.__file__).parent.parent for module in (torch, transformers) if module.__file__}:
        for path in folder.iterdir():
            if not path.name.startswith(("omni", "__editable__")) and not (links / path.name).exists():
                (links / path.name).symlink_to(path)
    found += "from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    done = python(found, links, folders[0], home=tmp_path, options=("-S",))
    assert done.returncode == 1
    assert "needs the package omni-thinker" in done.stderr.splitlines()[-1]
    assert "pip install omni-thinker" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["omni_tiny", "vision_tiny", "vision_world"])
def test_the_shipped_folders_name_the_classes_that_are_saved_today(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shipped, saved = ROOT / "checkpoints" / name, folders[0 if name == "omni_tiny" else 1]
    for file in ("config.json", "processor_config.json", "preprocessor_config.json"):
        if (saved / file).is_file():
            maps = [json.loads((folder / file).read_text())["auto_map"] for folder in (shipped, saved)]
            assert maps[0] == maps[1]
    assert (shipped / "omni_remote.py").read_bytes() == (saved / "omni_remote.py").read_bytes()


# --- The model card ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The hub's side, which is not here: it takes every file of a folder that is pushed, and has no card yet."""
    hub: dict[str, str] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> None:
            for operation in operations:
                with operation.as_file() as file:
                    hub[operation.path_in_repo] = file.read().decode("utf-8", "replace")

        def create_branch(self, *arguments: Any, **options: Any) -> None: ...

    def load_card(repo_id: str, **options: Any) -> ModelCard:
        if "README.md" not in hub:
            raise transformers.utils.hub.EntryNotFoundError("no card")
        return ModelCard(hub["README.md"])

    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda *_, **__: Api())
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", load_card)
    return hub


@pytest.fixture
def measured(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A checkpoint with a card, as `omni evaluate --card` leaves it."""
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED)
    model.save_pretrained(tmp_path / "mine")
    processor = transformers.AutoProcessor.from_pretrained(SHIPPED)
    processor.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/README.md").write_text("# Mine\n\nWords of mine.\n")
    result = evaluate(tmp_path / "mine", SceneSettings(pictures=2, kinds=("color",))).result
    update_card(tmp_path / "mine/README.md", result)
    return tmp_path / "mine"


def test_the_measured_tables_go_to_the_hub_with_the_weights_that_they_are_of(
    measured: Path, pushed: dict[str, str]
) -> None:
    card = (measured / "README.md").read_text()
    assert MEASURED.search(card)
    model = AutoModelForImageTextToText.from_pretrained(measured)
    model.push_to_hub("somebody/mine")
    assert pushed["README.md"] == card
    assert {"config.json", "model.safetensors", "omni_remote.py", "seal.json"} <= set(pushed)
    pushed.clear()
    # in the folder itself transformers would have replaced the card by an empty one
    model.save_pretrained(str(measured), push_to_hub=True, repo_id="somebody/mine")
    assert pushed["README.md"] == card == (measured / "README.md").read_text()
    assert pushed["seal.json"] == (measured / "seal.json").read_text()
    processor = transformers.AutoImageProcessor.from_pretrained(measured)
    processor.save_pretrained(str(measured.parent / "encoder"), push_to_hub=True, repo_id="somebody/encoder")
    assert json.loads(pushed["preprocessor_seal.json"])["files"].keys() == {"preprocessor_config.json"}

    with torch.no_grad():
        model.model.image_tower.norm.weight.add_(0.1)
    model.push_to_hub("somebody/mine")
    assert "Words of mine." in pushed["README.md"]  # the hub's card stays, but for what was measured on other weights
    assert not MEASURED.search(pushed["README.md"])
    pushed.clear()
    model.push_to_hub("somebody/other")
    assert "have not been measured" in pushed["README.md"]
    assert ModelCard(pushed["README.md"]).data.pipeline_tag == "image-text-to-text"
    assert "omni-thinker" in pushed["README.md"]


# --- Adapters of peft itself -------------------------------------------------------------------------------------------


def test_adapters_on_the_shipped_model_are_trained_saved_loaded_and_merged(tmp_path: Path) -> None:
    """With peft's own functions; recipes with `lora` are in tests/training."""
    torch.manual_seed(0)
    pixel_values = torch.randn(2, 3, 224, 224)
    ids = torch.tensor([[2, *[4] * 50, 3, 60, 61]] * 2)
    labels = torch.where(torch.arange(54) > 51, ids, -100)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids, pixel_values=pixel_values).logits

    before = logits(AutoModelForImageTextToText.from_pretrained(SHIPPED))
    wanted = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"], modules_to_save=["image_projector"])
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(SHIPPED), wanted).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits(adapted)
    assert not torch.allclose(trained, before, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapters")
    assert sum(file.stat().st_size for file in (tmp_path / "adapters").glob("*.safetensors")) < 3e6

    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(SHIPPED), tmp_path / "adapters")
    again, adapters = get_peft_model_state_dict(loaded), get_peft_model_state_dict(adapted)
    assert again.keys() == adapters.keys()
    assert all(torch.equal(again[name], adapters[name]) for name in again)
    torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), merged.state_dict().values(), strict=True))
