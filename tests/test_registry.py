"""The registry: exact names, nothing shared, and a broken plug-in breaks nobody else."""

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni import Modality, modalities, register_modality, registry

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    with registry.temporary():
        registry.get_modality("image")
        yield


def depth(**changes: Any) -> Modality:
    """A second modality made of the parts of the first."""
    image = registry.get_modality("image")
    values = {"name": "depth", "token": "<depth>", "inputs": ("depth_values",), "argument": "", **changes}
    return dataclasses.replace(image, **values)


# --- The bundle -------------------------------------------------------------------------------------------------------


def test_a_bundle_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        depth().name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Modality("depth", "<depth>")  # type: ignore[call-arg, misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Depth"}, "lower-case identifier .*'Depth'"),
        ({"name": "depth map"}, "lower-case identifier"),
        ({"name": "depth_"}, "lower-case identifier"),
        ({"name": "text"}, "'text' belongs to the language model"),
        ({"name": "language"}, "'language' belongs to the language model"),
        ({"token": ""}, "placeholder of 'depth'"),
        ({"token": " <depth>"}, "without spaces around, found ' <depth>'"),
        ({"inputs": ()}, "'depth' names no inputs"),
        ({"outputs": ()}, "outputs of 'depth'"),
        ({"outputs": ("grid", "pooled")}, r"some of cls, grid, cls\+grid; found \('grid', 'pooled'\)"),
    ],
)
def test_an_invalid_bundle_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth(**changes)


def test_the_processors_argument_is_the_plural() -> None:
    assert depth().argument == "depths"
    assert depth(argument="depth_maps").argument == "depth_maps"
    assert registry.get_modality("image").argument == "images"


# --- Names ------------------------------------------------------------------------------------------------------------


def test_registering_returns_the_bundle_and_makes_it_known() -> None:
    bundle = depth()
    assert register_modality(bundle) is bundle
    assert registry.get_modality("depth") is bundle
    assert {"depth", "image"} <= {modality.name for modality in registry.registered()}
    assert modalities()["depth"] == "registered by omni.vision.modeling_vision"


@pytest.mark.parametrize("name", ["Image", "images", "imag", "video"])
def test_names_are_exact_and_an_unknown_one_lists_the_known(name: str) -> None:
    register_modality(depth())
    with pytest.raises(ValueError, match=rf"Unknown modality '{name}'; known: .*'depth', 'image'"):
        registry.get_modality(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "image"}, r"'image' exists already \(entry point omni.vision.plugin:image"),
        ({"token": "<image>"}, "'<image>', which belongs to 'image'"),
        ({"inputs": ("depth_values", "pixel_values")}, "'pixel_values', which belongs to 'image'"),
        ({"argument": "images"}, "'images', which belongs to 'image'"),
    ],
)
def test_nothing_is_shared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_modality(depth(**changes))
    assert "depth" not in modalities()


def test_a_name_is_registered_once() -> None:
    register_modality(depth())
    with pytest.raises(ValueError, match=r"'depth' exists already \(registered by omni.vision.modeling_vision\)"):
        register_modality(depth(token="<depth2>", inputs=("other",), argument="others"))


def test_something_else_is_no_modality() -> None:
    with pytest.raises(ValueError, match=r"Expected an omni.Modality, found dict\."):
        register_modality({"name": "depth"})  # type: ignore[arg-type]


def test_a_model_type_that_belongs_to_another_class() -> None:
    from omni import OmniVisionConfig

    class DepthConfig(OmniVisionConfig):
        model_type = "clip_vision_model"

    with pytest.raises(
        ValueError, match=r"'clip_vision_model' of .*DepthConfig belongs to transformers.*CLIPVisionConfig"
    ):
        register_modality(depth(config_class=DepthConfig))
    assert "depth" not in modalities()


def test_modalities_are_listed_with_their_origin_and_not_loaded() -> None:
    code = (
        "import sys, omni; print(omni.modalities()['image']); "
        "print(*sorted({'torch', 'transformers', 'omni.vision.plugin'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["entry point omni.vision.plugin:image of omni", ""]


# --- For a while ------------------------------------------------------------------------------------------------------


def inputs_of_forward() -> set[str]:
    from omni import OmniForConditionalGeneration

    return {"pixel_values", "depth_values"} & set(inspect.signature(OmniForConditionalGeneration.forward).parameters)


def test_what_is_temporary_goes_again() -> None:
    with registry.temporary():
        register_modality(depth())
        assert inputs_of_forward() == {"pixel_values", "depth_values"}
    assert "depth" not in modalities()
    assert inputs_of_forward() == {"pixel_values"}
    with pytest.raises(ValueError, match="Unknown modality 'depth'"):
        registry.get_modality("depth")


def test_what_is_temporary_goes_also_after_an_error() -> None:
    with pytest.raises(RuntimeError), registry.temporary():
        register_modality(depth())
        raise RuntimeError
    assert "depth" not in modalities()


# --- Entry points -----------------------------------------------------------------------------------------------------


def package(folder: Path, name: str, code: str, modality: str = "", attribute: str = "bundle") -> None:
    """What pip leaves behind of a package that brings a modality."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[omni.modalities]\n{modality or name} = {name}:{attribute}\n")


BUNDLE = """
import dataclasses
from omni import registry
bundle = dataclasses.replace(
    registry.get_modality("image"), name="{name}", token="<{name}>", inputs=("{name}_values",), argument="{name}s"
)
"""


def test_a_broken_plug_in_breaks_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "plug_fine", BUNDLE.format(name="fine"), modality="fine")
    package(tmp_path, "plug_broken", "import no_such_module", modality="broken")
    package(tmp_path, "plug_absent", "", modality="absent")
    package(tmp_path, "plug_wrong", "bundle = 3", modality="wrong")
    package(tmp_path, "plug_misnamed", BUNDLE.format(name="other"), modality="misnamed")
    monkeypatch.syspath_prepend(tmp_path)
    known = modalities()
    assert known["broken"] == "entry point plug_broken:bundle of plug_broken 1.2"
    assert {"fine", "broken", "absent", "wrong", "misnamed", "image"} <= known.keys()

    assert registry.get_modality("image").name == "image"
    assert registry.get_modality("fine").token == "<fine>"
    with pytest.raises(
        ValueError, match=r"'broken' \(entry point plug_broken:bundle of plug_broken 1.2\) cannot be loaded"
    ):
        registry.get_modality("broken")
    with pytest.raises(ValueError, match=r"'absent' .* cannot be loaded"):
        registry.get_modality("absent")
    with pytest.raises(ValueError, match=r"found int \(entry point plug_wrong:bundle"):
        registry.get_modality("wrong")
    with pytest.raises(ValueError, match=r"entry point 'misnamed' .* holds the modality 'other'"):
        registry.get_modality("misnamed")


def test_a_plug_in_that_also_registers_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = BUNDLE.format(name="eager") + "registry.register_modality(bundle)\n"
    package(tmp_path, "plug_eager", code, modality="eager")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'eager' exists already \(entry point plug_eager:bundle of plug_eager 1.2\)"):
        registry.get_modality("eager")


def test_threads_that_ask_for_a_plug_in_at_once() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\nfrom threading import Barrier\nfrom omni import registry\n"
        "start = Barrier(8)\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    found = pool.map(lambda _: (start.wait(), registry.get_modality('image'))[1], range(8))\n"
        "    assert len({id(each) for each in found}) == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_packages_that_bring_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "plug_one", BUNDLE.format(name="same"), modality="same")
    package(tmp_path, "plug_two", BUNDLE.format(name="same"), modality="same")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"Two installed packages bring a modality 'same': plug_\w+:bundle and plug_\w+"
    ):
        registry.get_modality("same")


def test_a_package_cannot_take_the_place_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "plug_thief", "bundle = None", modality="image")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Two installed packages bring a modality 'image'"):
        modalities()


# --- Public names -----------------------------------------------------------------------------------------------------


def test_public_names_are_those_that_exist() -> None:
    import omni

    for name in dir(omni):
        assert getattr(omni, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'OmniAudio'"):
        omni.OmniAudio  # noqa: B018
