"""`omni check-plugin`: a plug-in that keeps the contract passes; each fault gets a sentence that says what to fix."""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from omni import Modality, OmniConfig, OmniForConditionalGeneration, OmniProcessor, registry
from omni.cli.app import app
from omni.contract import bundle, encoder, fused, suite
from omni.contract.checks import Finding, examine
from omni.contract.plugins import PluginError, find
from omni.contract.subject import Subject
from omni.exchange.onnx import DifferenceError, ExportError, MissingPackageError
from omni.fusion.parts import read_tower
from omni.modality import ItemError

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parent / "docs" / "adding-a-modality.md").read_text(encoding="utf-8")
CODE = re.compile(r"^```python\n(# omni_wave/plugin\.py\n.*?)^```$", re.DOTALL | re.MULTILINE)

LONG = {"fresh process", "export"}
"""Checks that take many seconds; the first has a test of its own, export has others."""


@pytest.fixture(scope="module", autouse=True)
def _importable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The packages of the tests, and that of the documentation, as its page has it."""
    site, patch = tmp_path_factory.mktemp("site"), pytest.MonkeyPatch()
    (site / "omni_wave").mkdir()
    (code,) = CODE.findall(PAGE)
    (site / "omni_wave" / "plugin.py").write_text(code, encoding="utf-8")
    folders = [site, HERE / "plugins" / "omni_signal", HERE / "plugins" / "omni_video"]
    for folder in folders:
        patch.syspath_prepend(folder)
    yield
    patch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] in ("omni_wave", "omni_signal", "omni_video")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with registry.temporary():
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], list[Path]]:
    """An example file of a modality, if it has files."""
    random = np.random.default_rng(7)

    def make(name: str) -> list[Path]:
        if name == "image":
            return [HERE.parent / "examples" / "scene.png"]
        if name == "audio":
            import soundfile

            soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(9000) / 8) / 3, 16_000)
            return [tmp_path / "tone.wav"]
        if name == "video":
            np.save(tmp_path / "clip.npy", random.integers(0, 256, (6, 18, 20, 3), dtype=np.uint8))
            return [tmp_path / "clip.npy"]
        if name == "signal":
            np.save(tmp_path / "signal.npy", random.normal(size=20).astype(np.float32))
            return [tmp_path / "signal.npy"]
        return []

    return make


ADDRESSES = {
    "image": "image",
    "audio": "audio",
    "signal": "omni_signal.plugin:signal",
    "wave": "omni_wave.plugin:wave",
    "video": "omni_video.plugin:video",
}


@pytest.mark.new_chats
@pytest.mark.parametrize("name", ADDRESSES)
def test_it_keeps_the_contract(name: str, file: Callable[[str], list[Path]]) -> None:
    (modality,) = find(ADDRESSES[name])
    subject = Subject(modality, file(name) if modality.open else [])
    checks = [check for check in suite.CHECKS if check.name not in LONG]
    found = {finding.check: finding for finding in examine(subject, checks)}
    broken = {check: finding.sentence for check, finding in found.items() if finding.result == "failed"}
    assert broken == {}
    core = [check.name for check in (*encoder.CHECKS, *fused.CHECKS) if check.name not in LONG]
    assert [found[check].result for check in (*core, "ask", "load")] == ["passed"] * (len(core) + 2)
    for field, depends in {"open": ("bad files", "files"), "show": ("show",), "stand_ins": ("stand_ins",)}.items():
        for check in depends:
            offered = getattr(modality, field) is not None
            assert found[check].result == ("passed" if offered else "not offered")
            assert offered or found[check].sentence.startswith(f"`{field}`: with it, ")


# --- Broken ones ------------------------------------------------------------------------------------------------------


def small_signal() -> Modality:
    """The signals of the tests, with the fields alone that a bundle needs."""
    (signal,) = find(ADDRESSES["signal"])
    return replace(signal, open=None, suffixes=(), media_types=(), show=None, stand_ins=None)


def without_a_frame(signal: Modality) -> Modality:
    return replace(signal, grid_shapes=lambda config, inputs: [(2,)] * len(inputs["signal_lengths"]))


def with_a_frame_too_many(signal: Modality) -> Modality:
    return replace(
        signal,
        grid_shapes=lambda config, inputs: [(int(n) // config.hop + 1,) for n in inputs["signal_lengths"]],
    )


def by_chance(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        def forward(self, signal_values: torch.Tensor, signal_lengths: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(signal_values, signal_lengths)
            output.grid = nn.functional.dropout(output.grid, 0.1)  # also in eval mode
            return output

    return replace(signal, model_class=Encoder)


def sees_padding(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        def forward(self, signal_values: torch.Tensor, signal_lengths: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(signal_values, torch.full_like(signal_lengths, signal_values.shape[1]))
            real = torch.arange(output.grid.shape[1]) < (signal_lengths // self.config.hop)[:, None]
            output.grid = output.grid * real[..., None]
            return output

    return replace(signal, model_class=Encoder)


def always_float32(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        def forward(self, signal_values: torch.Tensor, signal_lengths: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(signal_values, signal_lengths)
            output.cls = output.cls.float()
            return output

    return replace(signal, model_class=Encoder)


def with_an_unused_layer(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    return replace(signal, model_class=Encoder)


def doubles_its_width(signal: Modality) -> Modality:
    from transformers import PreTrainedConfig

    class Config(PreTrainedConfig):
        model_type = "toy_doubling"

        def __init__(self, hop: int = 4, hidden_size: int = 8, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.hop, self.hidden_size, self.num_attention_heads = hop, 2 * hidden_size, 2

    class Encoder(signal.model_class):
        config_class = Config

    return replace(signal, config_class=Config, model_class=Encoder)


def renamed_inputs(signal: Modality) -> Modality:
    return replace(signal, inputs={"signal_values": "samples", "signal_lengths": "signal_lengths"})


def open_array(source: Any) -> np.ndarray:
    return {"a.sig": np.zeros(8, np.float32)}[source]


def raises_key_error(signal: Modality) -> Modality:
    return replace(signal, open=open_array, suffixes=(".sig",))


def knows_no_kinds(signal: Modality) -> Modality:
    def opened(source: Any) -> Any:
        raise ItemError("It is no signal, expected one; check it.")

    return replace(signal, open=opened, suffixes=(".sig",))


def takes_pairs_for_lists(signal: Modality) -> Modality:
    def probes(config: Any, preprocessor: Any) -> list[Any]:
        return [(item, 16_000) for item in signal.probes(config, preprocessor)]

    class Preprocessor(signal.preprocessor_class):
        def __call__(self, items: Any, **kwargs: Any) -> Any:
            return super().__call__([array for array, rate in items], **kwargs)

    return replace(signal, probes=probes, preprocessor_class=Preprocessor)


def takes_the_pictures_placeholder(signal: Modality) -> Modality:
    return replace(signal, token="<image>")


def drops_short_items(signal: Modality) -> Modality:
    class Preprocessor(signal.preprocessor_class):
        def __call__(self, items: Any, **kwargs: Any) -> Any:
            return super().__call__([item for item in items if len(item) > 10], **kwargs)

    return replace(signal, preprocessor_class=Preprocessor)


def forgets_its_gain(signal: Modality) -> Modality:
    class Preprocessor(signal.preprocessor_class):
        def to_dict(self) -> dict[str, Any]:
            return {"hop": self.hop}

    return replace(signal, preprocessor_class=Preprocessor)


def keeps_a_buffer_to_itself(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("shift", torch.randn(config.hidden_size), persistent=False)

        def forward(self, signal_values: torch.Tensor, signal_lengths: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(signal_values, signal_lengths)
            output.cls = output.cls + self.shift.to(output.cls.dtype)
            return output

    return replace(signal, model_class=Encoder)


def is_deaf(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        def forward(self, signal_values: torch.Tensor, signal_lengths: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(0 * signal_values, signal_lengths)
            output.grid = output.grid[:, :1].expand_as(output.grid)
            return output

    return replace(
        signal,
        model_class=Encoder,
        grid_shapes=lambda config, inputs: (
            [(int(inputs["signal_lengths"].max()) // config.hop,)] * len(inputs["signal_lengths"])
        ),
        probes=lambda config, preprocessor: [np.full(16, height, np.float32) for height in range(4)],
    )


def has_no_summary(signal: Modality) -> Modality:
    return replace(signal, read=lambda encoded, n: {"grid": encoded.grid})


def has_suffixes_alone(signal: Modality) -> Modality:
    return replace(signal, suffixes=(".sig",))


def brings_no_items(signal: Modality) -> Modality:
    return replace(signal, probes=None)


BROKEN: dict[Callable[[Modality], Modality], tuple[str, str]] = {
    without_a_frame: (
        "shapes",
        r"`grid` has 16 tokens, but `grid_shapes` says 2, so the last ones are never read; count",
    ),
    with_a_frame_too_many: (
        "shapes",
        r"`grid` has 16 tokens, but `grid_shapes` says 17; make them agree\.",
    ),
    by_chance: ("determinism", r"`grid` of the same items differs from call to call; remove randomness from forward"),
    sees_padding: (
        "batch = single",
        r"`\w+` of item \d differs between a batch of 4 .*; mask the padding in the encoder",
    ),
    always_float32: ("dtype", r"In a bfloat16 model `cls` is float32; convert .* with `\.to\(self\.dtype\)`"),
    with_an_unused_layer: (
        "gradients",
        r"No gradient reaches pooler\.weight, pooler\.bias: neither cls nor grid .*; use it",
    ),
    doubles_its_width: (
        "configuration",
        r"Config does not come back .*: hidden_size is 16, and then 32; let __init__ keep values as they are given",
    ),
    renamed_inputs: ("encoder", r"`inputs` hands signal_values to the argument 'samples', which .* does not have"),
    raises_key_error: (
        "bad files",
        r"`open` of a missing file raises KeyError .*, expected an omni.modality.ItemError",
    ),
    knows_no_kinds: ("bad files", r"kind 'unreadable', expected 'missing'; raise a subclass with `kind = \"missing\"`"),
    takes_pairs_for_lists: ("is_item", r"`is_item` takes an item, a tuple, for several; let it be true of tuples"),
    takes_the_pictures_placeholder: ("registered", r"wants '<image>', which belongs to 'image'; placeholders"),
    drops_short_items: (
        "preprocessor",
        r"Of 4 items the preprocessor makes 3 of signal_values; .* keep every one of them",
    ),
    forgets_its_gain: ("settings", r"to_dict\(\) of Preprocessor lacks 'gain', so a checkpoint forgets it; add it\."),
    keeps_a_buffer_to_itself: (
        "save and load",
        r"another `cls`; .*: make buffers persistent, or fill them in `_init_weights`",
    ),
    is_deaf: ("reading", r"tokens of two different items are equal; let forward read all of `inputs`"),
    has_no_summary: (
        "shapes",
        r"`outputs` promises 'cls', and the encoder returns \['grid'\]; return it, or leave it out",
    ),
    has_suffixes_alone: ("fields", r"The bundle has suffixes, but nothing opens such files; add `open`\."),
    brings_no_items: ("items", r"There is no item to try the bundle with; add `probes`"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_it_says_what_to_fix(broken: Callable[[Modality], Modality]) -> None:
    """The first check that fails names the fault, as one sentence."""
    signal = small_signal()
    checks = (*bundle.CHECKS, *encoder.CHECKS)
    failed = next(finding for finding in examine(Subject(broken(signal)), checks) if finding.result == "failed")
    check, sentence = BROKEN[broken]
    assert failed.check == check, failed.sentence
    assert re.search(sentence, failed.sentence), failed.sentence
    assert failed.sentence.endswith(".")
    assert "\n" not in failed.sentence


def test_an_error_of_the_plugin_is_told_with_its_line() -> None:
    def shapes(config: Any, inputs: Any) -> Any:
        return {}["grid"]

    signal = small_signal()
    found = examine(Subject(replace(signal, grid_shapes=shapes)), (*bundle.CHECKS, *encoder.CHECKS))
    failed = next(finding for finding in found if finding.result == "failed")
    line = shapes.__code__.co_firstlineno + 1
    assert f"found KeyError: 'grid' in test_contract.py, line {line}; fix that." in failed.sentence


def test_what_depends_on_a_broken_promise_is_not_run() -> None:
    signal = small_signal()
    found = {each.check: each for each in examine(Subject(brings_no_items(signal)), suite.CHECKS)}
    assert found["items"].result == "failed"
    assert found["preprocessor"] == Finding(check="preprocessor", result="not run", sentence="It comes after 'items'.")
    assert {each.result for each in found.values()} == {"passed", "failed", "not run", "not offered"}
    assert {name for name, each in found.items() if each.result == "failed"} == {"items"}


def test_the_page_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is printed of its plug-in where the padding is not masked."""
    shown = re.findall(r"^│ (.+?) +│ ([a-z ]+?) +│ (.+)$", PAGE, re.MULTILINE)
    said = {(name, result): sentence for name, result, sentence in shown}
    (wave,) = find(ADDRESSES["wave"])
    checks = {check.name: check for check in suite.CHECKS}
    found = {each.check: each for each in examine(Subject(wave), (*bundle.CHECKS, *encoder.CHECKS))}
    for (name, result), sentence in said.items():
        if result == "passed":
            assert sentence == checks[name].promise
        elif result == "not offered":
            assert found[name] == Finding(check=name, result=result, sentence=sentence)
    (code,) = CODE.findall(PAGE)
    (tmp_path / "unmasked.py").write_text(code.replace(" * real[..., None]", "").replace('"wave"', '"hum"'))
    monkeypatch.syspath_prepend(tmp_path)
    with registry.temporary():
        registry._registered.pop("wave", None)
        found = {
            each.check: each for each in examine(Subject(*find("unmasked:wave")), (*bundle.CHECKS, *encoder.CHECKS))
        }
    failed = [(each.check, each.result, each.sentence) for each in found.values() if each.result == "failed"]
    assert failed == [each for each in shown if each[1] == "failed"]


def excuses_lost_tensors(signal: Modality) -> Modality:
    class Encoder(signal.model_class):
        _keys_to_ignore_on_load_missing = [r"norm", r"proj"]
        _keys_to_ignore_on_load_unexpected = [r".*"]

    return replace(signal, model_class=Encoder)


def test_no_encoder_excuses_lost_tensors(tmp_path: Path) -> None:
    """Neither in a fused model nor alone, whatever its class says."""
    subject = Subject(excuses_lost_tensors(small_signal()))
    found = {each.check: each for each in examine(subject, (*bundle.CHECKS, *encoder.CHECKS))}
    assert found["strict loading"].result == "passed", found["strict loading"].sentence
    subject.encoder.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "norm" in name)
    save_file({name: each for name, each in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    read, report = read_tower(subject.modality, tmp_path, subject.encoder.config)
    assert {*report["missing_keys"]} == {lost}
    assert type(read) is type(subject.encoder)


@pytest.mark.parametrize(
    ("error", "result"), [(ExportError, "not offered"), (MissingPackageError, "not run"), (DifferenceError, "failed")]
)
def test_why_there_are_no_graphs_is_told(error: type[Exception], result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any) -> None:
        raise error("it cannot be.")

    monkeypatch.setattr("omni.exchange.onnx.export", export)
    (check,) = (each for each in suite.CHECKS if each.name == "export")
    subject = Subject(registry.register_modality(small_signal()))
    (found,) = examine(subject, [check])
    assert found.result == result
    assert found.sentence.endswith("`omni export` says: it cannot be.")


# --- What a preprocessor makes ----------------------------------------------------------------------------------------


class Makes(dict[str, list[int]]):
    """A preprocessor that makes these."""

    def __init__(self, made: dict[str, list[int]], names: list[str]) -> None:
        super().__init__(made)
        self.model_input_names = names

    def __call__(self, items: Any) -> dict[str, list[int]]:
        return dict(self)


VALUES, LENGTHS = [1], [2]


@pytest.mark.parametrize(
    ("made", "names"),
    [
        ({"signal_values": VALUES, "signal_lengths": LENGTHS}, ["signal_values", "signal_lengths"]),
        ({"signal_lengths": LENGTHS, "signal_values": VALUES}, ["signal_lengths", "signal_values"]),
        ({"lengths": LENGTHS, "values": VALUES}, ["values", "lengths"]),
        ({"lengths": LENGTHS, "signal_values": VALUES}, ["lengths", "signal_values"]),
    ],
)
def test_inputs_are_found_by_name_and_else_in_order(made: dict[str, list[int]], names: list[str]) -> None:
    found = registry.prepare_items(small_signal(), Makes(made, names), [], {})
    assert found == {"signal_values": VALUES, "signal_lengths": LENGTHS}


@pytest.mark.parametrize(
    "made", [{"signal_values": VALUES}, {"signal_values": VALUES, "signal_lengths": LENGTHS, "rates": [3]}]
)
def test_inputs_that_lack_or_are_left_over_are_refused(made: dict[str, list[int]]) -> None:
    with pytest.raises(
        ValueError, match=r"reads \['signal_values', 'signal_lengths'\]; its plug-in has to say which is which"
    ):
        registry.prepare_items(small_signal(), Makes(made, [*made]), [], {})


# --- Videos beside pictures -------------------------------------------------------------------------------------------


def test_videos_and_pictures_each_have_their_pixels() -> None:
    """Both encoders have an argument `pixel_values`; the batch has one key for each."""
    from omni.training.tokenizer import train_tokenizer

    (video,) = find(ADDRESSES["video"])
    registry.register_modality(video)
    tokenizer = train_tokenizer(["what is that"] * 4, 300, {"image": "<image>", "video": "<video>"})
    small = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sections = {
        "image": {"encoder": {**small, "intermediate_size": 16}, "projector": "linear"},
        "video": {"encoder": {}, "output": "grid", "projector": "unshuffle_mlp", "factor": 2},
    }
    for name, section in sections.items():
        section["token_id"] = tokenizer.convert_tokens_to_ids(f"<{name}>")
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities=copy.deepcopy(sections), text_config=text)).eval()
    processor = OmniProcessor(
        tokenizer=tokenizer,
        preprocessors={"image": registry.get_modality("image").preprocessor_class(size={"height": 16, "width": 16})},
        modalities=model.config.modalities,
    )
    random = np.random.default_rng(0)
    clips = [random.integers(0, 256, (5, 20, 20, 3), dtype=np.uint8) for _ in range(2)]
    picture = Image.fromarray(clips[0][0])
    inputs = processor(text="<video><image> what is that <video>", images=[picture], videos=clips, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert inputs["video_values"].shape == (2, 4, 3, 16, 16)
    # 2 x 2 x 2 places, 8 of which become one token; and CLS beside 2 x 2 patches
    counts = [int((inputs["input_ids"] == sections[name]["token_id"]).sum()) for name in ("video", "image")]
    assert counts == [2, 5]
    with torch.no_grad():
        seen = model(**inputs)
        assert {name: len(tokens) for name, tokens in seen.encoder_hidden_states.items()} == {"image": 5, "video": 2}
        inputs["video_values"] = inputs["video_values"].flip(0)
        assert not torch.equal(model(**inputs).logits, seen.logits)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip writes beside a package."""
    notes = tmp_path / "omni_video-0.0.1.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: omni-video\nVersion: 0.0.1\n")
    (notes / "entry_points.txt").write_text("[omni.modalities]\nvideo = omni_video.plugin:video\n")
    (notes / "top_level.txt").write_text("omni_video\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_the_command_checks_an_installed_package_also_in_a_fresh_process(
    file: Callable[[str], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "CHECKS", (*bundle.CHECKS, *encoder.CHECKS, *fused.CHECKS))
    (clip,) = file("video")
    ran = CliRunner().invoke(app, ["check-plugin", "omni-video", "--file", str(clip), "--json"])
    found = json.loads(ran.stdout)
    assert [each for each in found["modalities"]["video"] if each["result"] != "passed"] == []
    assert (ran.exit_code, found["package"], found["passed"]) == (0, "omni-video", True)
    assert "fresh process" in {each["check"] for each in found["modalities"]["video"]}
    assert [modality.name for modality in find("omni_video")] == ["video"]


def test_the_command_ends_with_1_where_a_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "CHECKS", bundle.CHECKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = "from dataclasses import replace\nfrom omni_wave.plugin import wave\n"
    Path("mine.py").write_text(code + "broken = replace(wave, suffixes=('.wave',))\n")
    ran = CliRunner().invoke(app, ["check-plugin", "mine:broken"])
    assert ran.exit_code == 1, ran.output
    assert "The bundle has suffixes, but nothing opens such files; add `open`." in ran.stdout
    assert ran.stdout.splitlines()[-1] == "6 passed, 1 failed, 3 not offered, 1 not run"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing-of-that-name",
            r"Expected a modality \(audio, image\), an installed package or module:attribute, found",
        ),
        ("pillow", "The package 'pillow' brings no modality; name its bundle in the entry points 'omni.modalities'"),
        ("no_such_module:wave", "'no_such_module:wave' cannot be loaded"),
        ("omni.modality:ItemError", "'omni.modality:ItemError' is a type, expected an omni.Modality"),
    ],
)
def test_a_name_of_no_plugin(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        find(name)
    ran = CliRunner().invoke(app, ["check-plugin", name])
    assert ran.exit_code == 2


def test_files_for_a_plugin_that_opens_none(tmp_path: Path) -> None:
    (tmp_path / "a.wave").write_bytes(b"")
    ran = CliRunner().invoke(app, ["check-plugin", ADDRESSES["wave"], "--file", str(tmp_path / "a.wave")])
    assert ran.exit_code == 2
    assert "opens no files" in ran.stderr


def test_settings_of_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "CHECKS", (*bundle.CHECKS, *encoder.CHECKS))
    (tmp_path / "small.json").write_text('{"hidden_size": 8}')
    (tmp_path / "bad.json").write_text("[]")
    run = [
        CliRunner().invoke(app, ["check-plugin", ADDRESSES["wave"], "--config", str(tmp_path / each)])
        for each in ("small.json", "bad.json")
    ]
    assert [each.exit_code for each in run] == [0, 2]


def test_every_check_says_what_it_promises() -> None:
    names = [check.name for check in suite.CHECKS]
    assert len(names) == len(set(names))
    for place, check in enumerate(suite.CHECKS):
        assert check.promise.endswith(".")
        assert set(check.needs) <= set(names[:place]), check.name
