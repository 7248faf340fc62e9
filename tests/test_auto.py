"""transformers' Auto classes know omni's, whichever module of omni is imported first."""

import subprocess
import sys

EACH = """
import os, sys, torch

for name, model_type in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:  # in a process of its own, which has torch already
        __import__(name)
        from transformers import AutoConfig, AutoModel
        print(name, type(AutoModel.from_config(AutoConfig.for_model(model_type))).__name__, flush=True)
        os._exit(0)
    os.wait()
"""


def test_what_brings_a_model_may_be_imported_first() -> None:
    expected = {
        ("omni.blocks", "omni_vision"): "OmniVisionModel",
        ("omni.audio.modeling_audio", "omni_audio"): "OmniAudioModel",
    }
    command = [sys.executable, "-c", EACH, *(word for pair in expected for word in pair)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [f"{name} {found}" for (name, _), found in expected.items()], run.stderr
