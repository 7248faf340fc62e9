"""Files go to modalities by what they hold and by their suffix."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni.audio.sound import Sound
from omni.items import Item, nouns, read_item, read_items
from omni.modality import ItemError

SCENE = Path(__file__).parent.parent / "examples" / "scene.png"


@pytest.fixture
def files(tmp_path):
    import soundfile

    shutil.copy(SCENE, tmp_path / "scene.png")
    shutil.copy(SCENE, tmp_path / "scene.wav")
    shutil.copy(SCENE, tmp_path / "scene")
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(1600) / 5), 16_000)
    shutil.copy(tmp_path / "tone.wav", tmp_path / "tone.PNG")
    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "cut.wav").write_bytes(SCENE.read_bytes()[:3000])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "modality"),
    [("scene.png", "image"), ("scene.wav", "image"), ("scene", "image"), ("tone.wav", "audio"), ("tone.PNG", "audio")],
)
def test_what_a_file_holds_decides(files, name, modality):
    expected = {"image": Image.Image, "audio": Sound}[modality]
    for source in (files / name, str(files / name), (files / name).read_bytes()):
        item = read_item(source)
        assert item.modality == modality
        assert isinstance(item.value, expected)
    assert read_item(item) is item
    assert read_item(item.value).modality == modality


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.png", "does not exist.*expected a JPEG"),
        ("none.wav", "does not exist.*expected a WAV"),
        ("none", "does not exist.*expected a sound or a picture"),
        (".", "is a folder, expected a sound or a picture"),
        ("letter.pdf", "not a sound.*a PDF document.*not a picture.*a PDF document"),
        ("cut.wav", "end too early"),
    ],
)
def test_a_file_of_no_modality_is_refused(files, name, says):
    with pytest.raises(ItemError, match=f"(?s){says}"):
        read_item(files / name)


def test_only_some_modalities_may_be_asked(files):
    with pytest.raises(ItemError, match=r"not a picture.*expected .*JPEG"):
        read_item(files / "tone.wav", among=["image"])
    with pytest.raises(ItemError, match="Expected a sound or a picture, found float"):
        read_item(1.5)


def test_a_picture_does_not_wake_the_other_modalities(files):
    code = f"from omni.items import read_item; read_item({str(files / 'scene.png')!r}); import sys; "
    found = subprocess.run(
        [sys.executable, "-c", code + "print('soundfile' in sys.modules, 'torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["False", "False"]


def test_items_are_counted_in_words(files):
    names = ["scene.png", "tone.wav", "tone.PNG"]
    assert nouns(read_items(files / name for name in names)) == "picture and 2 sounds"
    assert nouns([Item("image", None)] * 3) == "3 pictures"
