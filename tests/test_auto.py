"""transformers' Auto classes know omni's, in every order of imports."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto import image_processing_auto, modeling_auto, processing_auto
fused, encoder = type(AutoConfig.for_model("omni")), type(AutoConfig.for_model("omni_vision"))
print(fused.__name__, encoder.__name__, AutoModel._model_mapping[fused].__name__)
print(AutoModel._model_mapping[encoder].__name__, AutoModelForImageTextToText._model_mapping[fused].__name__)
print(AutoModelForMultimodalLM._model_mapping[fused].__name__, processing_auto.PROCESSOR_MAPPING[fused].__name__)
print(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["omni"])
assert encoder in image_processing_auto.IMAGE_PROCESSOR_MAPPING
classifier = type(AutoConfig.for_model("omni_classifier"))
assert classifier in image_processing_auto.IMAGE_PROCESSOR_MAPPING
for table in (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING):
    assert table[classifier].__name__ == "OmniForClassification"
"""
FOUND = [
    *("OmniConfig", "OmniVisionConfig", "OmniModel"),
    *("OmniVisionModel", "OmniForConditionalGeneration"),
    *("OmniForConditionalGeneration", "OmniProcessor"),
    "OmniForConditionalGeneration",
]


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel, AutoProcessor, AutoImageProcessor\nimport omni",
        "from transformers import AutoConfig\nAutoConfig.for_model('vit')\nfrom omni import OmniProcessor",
    ],
)
def test_omni_may_be_imported_after_transformers(first: str, python: Callable[..., Any]) -> None:
    run = python("-c", first + KNOWN)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == FOUND


EACH = """
import os, sys, torch

for code in sys.argv[1:]:
    if (child := os.fork()) == 0:  # in a process of its own, which has torch already, and nothing of transformers
        assert not {"transformers", "omni"} & set(sys.modules)
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
MADE = """
from transformers import AutoConfig, AutoModel
print(type(AutoModel.from_config(AutoConfig.for_model("{}"))).__name__)
"""


def test_any_module_of_omni_may_be_imported_first() -> None:
    expected = {
        "import omni" + KNOWN: FOUND,
        "from omni.fusion.modeling_omni import OmniModel" + KNOWN: FOUND,
        "import omni.blocks" + MADE.format("omni_vision"): ["OmniVisionModel"],
        "import omni.audio.modeling_audio" + MADE.format("omni_audio"): ["OmniAudioModel"],
    }
    run = subprocess.run([sys.executable, "-c", EACH, *expected], capture_output=True, text=True, check=False)
    assert run.stdout.split() == [name for names in expected.values() for name in names], run.stderr
