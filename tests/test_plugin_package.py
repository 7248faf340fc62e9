"""A modality from another package, installed by pip and found by its entry point, beside pictures in one prompt.

`plugins/omni_signal` is all that its author wrote: a configuration, an encoder, a preprocessor and one `Modality`. Signals
have different lengths, so that their items become different numbers of tokens.
"""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

import omni
from omni import OmniConfig, OmniForConditionalGeneration, OmniImageProcessor, OmniProcessor, registry
from omni.checkpoints.folder import CheckpointError
from omni.embedding import SourceError, embed
from omni.fusion import processing_omni
from omni.loading.encoder import load_encoder
from omni.loading.preprocessor import save_preprocessor

HERE = Path(__file__).resolve().parent
Run = Callable[..., subprocess.CompletedProcess[str]]
MODALITIES: dict[str, Any] = {
    "signal": {
        "encoder": {"model_type": "toy_signal"},
        "output": "cls+grid",
        "projector": "unshuffle_mlp",
        "factor": 2,
    },
    "image": {
        "encoder": {
            "model_type": "omni_vision",
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "output": "grid",
        "projector": "mlp",
    },
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it, in a folder of its own; this environment stays as it is."""
    source, target = tmp_path_factory.mktemp("source") / "omni_signal", tmp_path_factory.mktemp("site")
    shutil.copytree(HERE / "plugins" / "omni_signal", source)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


@pytest.fixture(scope="module", autouse=True)
def _installed(site: Path) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(site)
    with registry.temporary():
        yield
    patch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "omni_signal"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def pair() -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    from omni.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        ["which signal is louder", "what is that"] * 4, 300, {"image": "<image>", "signal": "<signal>"}
    )
    sections = {
        name: {**section, "token_id": tokenizer.convert_tokens_to_ids(f"<{name}>")}
        for name, section in MODALITIES.items()
    }
    text = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities=copy.deepcopy(sections), text_config=text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    processor = OmniProcessor(
        tokenizer=tokenizer,
        preprocessors={"image": OmniImageProcessor(size={"height": 16, "width": 16})},
        modalities=model.config.modalities,
    )
    return model, processor


def wave(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


ROWS: list[tuple[str, list[Any], list[Any]]] = [
    ("<signal> or <image> or <signal>?", [photo(1)], [wave(24, 1), wave(64, 2)]),
    ("what is that", [], []),
    ("<image><image> and <signal>", [photo(2), photo(3)], [wave(40, 3)]),
    ("<signal>", [], [wave(8, 4)]),
]


def batch(processor: OmniProcessor, rows: list[tuple[str, list[Any], list[Any]]], side: str = "left") -> dict[str, Any]:
    images = [image for _, images, _ in rows for image in images]
    signals = [signal for *_, signals in rows for signal in signals]
    return dict(
        processor(
            text=[text for text, *_ in rows],
            images=images or None,
            signals=signals or None,
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )
    )


def answers(model: OmniForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def test_it_is_found_in_a_fresh_process(site: Path) -> None:
    code = "import omni, sys; print(omni.modalities()['signal']); assert 'omni_signal' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(HERE.parent)])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "entry point omni_signal.plugin:signal of omni-signal 0.0.1"


def test_no_line_of_omni_knows_of_it() -> None:
    names = {"omni_signal", "toy_signal", "signal_values", "signal_lengths", "<signal>", "SignalEncoder"}
    found = []
    for path in Path(omni.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if id(node) in documentation:
                continue
            words = {getattr(node, key, None) for key in ("id", "attr", "arg", "name", "module", "value")}
            found += [f"{path.name}: {word}" for word in words if isinstance(word, str) and names & {word}]
    assert found == []


def test_items_become_as_many_tokens_as_they_are_long(pair: tuple[Any, OmniProcessor]) -> None:
    model, processor = pair
    inputs = batch(processor, ROWS)
    signal, image = model.config.signal_token_id, model.config.image_token_id
    # 24 and 64 samples are 6 and 16 frames, two of which become one token; CLS comes on top
    assert (inputs["input_ids"] == signal).sum(-1).tolist() == [1 + 3 + 1 + 8, 0, 1 + 5, 1 + 1]
    assert (inputs["input_ids"] == image).sum(-1).tolist() == [4, 0, 8, 0]
    assert inputs["signal_values"].shape == (4, 64)
    assert inputs["signal_lengths"].tolist() == [24, 64, 40, 8]
    features = model.get_signal_features(inputs["signal_values"], inputs["signal_lengths"]).pooler_output
    assert [len(item) for item in features] == [4, 9, 6, 2]


def test_the_towers_stand_in_the_order_of_their_names(pair: tuple[Any, Any]) -> None:
    """Also after a reload, since JSON is sorted: seeds and optimizer states depend on it."""
    names = [name for name, _ in pair[0].model.named_children()]
    assert names == ["image_tower", "image_projector", "signal_tower", "signal_projector", "language_model"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_answers_are_those_of_one_row_at_a_time(pair: tuple[Any, Any], side: str) -> None:
    model, processor = pair
    inputs = batch(processor, ROWS, side)
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            alone = model(**batch(processor, [row])).logits[0]
            together = model(**inputs).logits[i][inputs["attention_mask"][i].bool()]
            torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    alone = [answers(model, batch(processor, [row]))[0] for row in ROWS]
    assert len({tuple(answer) for answer in alone}) > 1
    assert answers(model, inputs) == alone
    assert answers(model, inputs, cache_implementation="static") == alone
    if processing_omni.UNMARKED:  # from transformers 5.23 on
        assert answers(model, inputs, prefill_chunk_size=5) == alone


def test_beams_and_several_answers(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    options = {"num_beams": 3, "num_return_sequences": 2}
    alone = [answer for row in ROWS for answer in answers(model, batch(processor, [row]), **options)]
    assert answers(model, batch(processor, ROWS), **options) == alone


def test_the_signal_matters(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    text, images, (first, second) = ROWS[0]
    with torch.no_grad():
        logits = [
            model(**batch(processor, [(text, images, signals)])).logits[0, -1]
            for signals in ([first, second], [-first, second])
        ]
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_encoded_once_and_asked_about_again(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs = batch(processor, ROWS)
    raw = {key: inputs.pop(key) for key in ("signal_values", "signal_lengths")}
    encoded = {"signal": model.get_signal_features(**raw)}
    assert answers(model, {**inputs, "mm_encoder_outputs": encoded}) == answers(model, {**inputs, **raw})


def test_every_parameter_learns(pair: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(pair[0]), pair[1]
    inputs = batch(processor, ROWS, "right")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_in_bfloat16(pair: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(pair[0]).to(torch.bfloat16), pair[1]
    assert len(answers(model, batch(processor, ROWS))) == len(ROWS)


def test_compiles_together_with_pictures(pair: tuple[Any, Any]) -> None:
    """Frame counts come from a tensor, so a plug-in with items of several lengths compiles in several graphs."""
    model, processor = pair
    torch.compiler.reset()
    inputs = batch(processor, ROWS[1:2])
    with torch.no_grad():
        found = torch.compile(model.forward, fullgraph=True, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(found, model(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "images", "signals", "message"),
    [
        ("<signal>", None, None, r"number of <signal> tokens .* items of modality 'signal', found 1 .* and 0"),
        ("<signal> <signal>", None, [wave(8)], r"'signal', found 2 \(by row: \[2\]\) and 1"),
        ("<image>", None, [wave(8)], r"'image', found 1 .* and 0"),
        ("hello", None, [wave(8)], r"'signal', found 0 .* and 1"),
    ],
)
def test_counts_are_checked_per_modality(
    pair: tuple[Any, Any], text: str, images: Any, signals: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pair[1](text=text, images=images, signals=signals, return_tensors="pt")


def test_a_count_that_the_model_finds(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs = batch(processor, ROWS)
    inputs["signal_lengths"] = inputs["signal_lengths"].clone()
    inputs["signal_lengths"][3] += 8
    with pytest.raises(ValueError, match=r"Row 3 has 2 placeholders <signal> for modality 'signal', .* 3 tokens"):
        model(**inputs)
    del inputs["signal_lengths"]
    with pytest.raises(ValueError, match=r"'signal' reads .*; missing: \['signal_lengths'\]"):
        model(**inputs)


@pytest.mark.new_chats
def test_a_chat_with_both(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    content = [
        {"type": "signal", "signal": wave(16)},
        {"type": "image", "image": photo(1)},
        {"type": "text", "text": "what is that"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    text = "<|user|><signal><image>what is that<|assistant|>"
    other = processor(text=text, images=[photo(1)], signals=[wave(16)], return_tensors="pt")
    assert inputs["input_ids"].equal(other["input_ids"])
    assert answers(model, dict(inputs)) == answers(model, dict(other))


def test_settings_of_its_preprocessor_for_one_call(pair: tuple[Any, OmniProcessor]) -> None:
    twice = pair[1](text="<signal>", signals=[wave(8)], signals_kwargs={"gain": 2.0}, return_tensors="pt")
    once = pair[1](text="<signal>", signals=[wave(8)], return_tensors="pt")
    torch.testing.assert_close(twice["signal_values"], 2 * once["signal_values"])


def test_packed_for_training(pair: tuple[Any, Any]) -> None:
    from omni.data.collate import ConversationCollator
    from omni.data.conversations import Example

    model, processor = pair
    user = {
        "role": "user",
        "content": [{"type": "signal"}, {"type": "image"}, {"type": "text", "text": "which is louder"}],
    }
    reply = {"role": "assistant", "content": [{"type": "text", "text": "that"}]}
    examples = [Example({"image": [photo(i)], "signal": [wave(8 + 16 * i)]}, [[user, reply]] * 2) for i in range(2)]
    inputs = ConversationCollator(processor)(examples)
    assert inputs["signal_lengths"].tolist() == [8, 24]
    with torch.no_grad():
        assert model(**inputs).loss.isfinite()


# --- On disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("both")
    for part in pair:
        part.save_pretrained(path)
    return path


def test_saved_and_loaded_by_the_auto_classes(pair: tuple[Any, Any], folder: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(model, OmniForConditionalGeneration)
    assert processor.to_dict() == pair[1].to_dict()
    inputs, expected = batch(processor, ROWS), batch(pair[1], ROWS)
    assert inputs.keys() == expected.keys()
    assert all(inputs[key].equal(expected[key]) for key in inputs)
    for name, tensor in pair[0].state_dict().items():
        assert model.state_dict()[name].equal(tensor), name
    assert answers(model, inputs) == answers(pair[0], expected)


def test_the_answer_of_a_fresh_process(pair: tuple[Any, Any], folder: Path, site: Path, python: Run) -> None:
    """Nothing is left from this process but the files and the installed package."""
    code = f"""
import json, sys, numpy as np, torch, omni
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM
model, processor = (auto.from_pretrained({str(folder)!r}) for auto in (AutoModelForImageTextToText, AutoProcessor))
wave = np.random.default_rng(4).normal(size=8).astype(np.float32)
inputs = processor(text="<signal>", signals=[wave], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
print(json.dumps(out[:, inputs["input_ids"].shape[1]:].tolist()))
"""
    run = python("-c", code, path=[site])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == answers(pair[0], batch(pair[1], ROWS[3:]))


@pytest.fixture
def uninstalled(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package had never been there."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    with registry.temporary():
        for table in (registry._registered, registry._origins):
            table.pop("signal", None)
        yield


@pytest.mark.usefixtures("uninstalled")
def test_without_the_package_its_name_is_in_the_message(folder: Path) -> None:
    for cls in (OmniConfig, OmniForConditionalGeneration, OmniProcessor):
        with pytest.raises(
            ValueError, match=r"Unknown modality 'signal'; known: \['audio', 'image'\]. Install the package"
        ):
            cls.from_pretrained(folder)


@pytest.mark.usefixtures("uninstalled")
def test_without_the_package_the_rest_can_be_had(folder: Path, pair: tuple[Any, Any], make_config: Callable) -> None:
    processor = OmniProcessor.from_pretrained(folder, modalities={"signal": None})
    assert sorted(processor.preprocessors) == ["image"]
    config = OmniConfig.from_pretrained(folder, signal_config=None)
    assert sorted(config.modalities) == ["image"]
    for left_out in ({"signal_config": None}, {"modalities": {"signal": None}}):
        for cls in (OmniForConditionalGeneration, AutoModelForImageTextToText):
            model = cls.from_pretrained(folder, **left_out)
            kept = {name for name in pair[0].state_dict() if "signal" not in name}
            assert model.state_dict().keys() == kept


def test_its_encoder_alone_from_the_fused_folder(folder: Path, pair: tuple[Any, Any]) -> None:
    from omni import OmniVisionModel

    tower = OmniVisionModel.from_pretrained(folder)
    for name, tensor in pair[0].model.image_tower.state_dict().items():
        assert tower.state_dict()[name].equal(tensor), name


# --- Its encoder in a folder of its own -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone")
    pair[0].model.signal_tower.save_pretrained(path)
    save_preprocessor(pair[1].preprocessors["signal"], path)
    return path


def test_the_auto_classes_of_a_fresh_process_know_its_folder(alone: Path, site: Path, python: Run) -> None:
    """The plug-in is loaded for it, and for nothing before."""
    code = f"""
import sys, omni
from transformers import AutoConfig, AutoModel
AutoConfig.for_model("omni_vision")
assert "omni_signal" not in sys.modules
print(type(AutoModel.from_pretrained({str(alone)!r})).__name__)
try:
    AutoConfig.for_model("nothing")
except ValueError as error:
    print("nothing" in str(error))
"""
    run = python("-c", code, path=[site])
    assert run.stdout.split() == ["SignalEncoder", "True"], run.stderr


def test_embedded_whatever_lies_beside(pair: tuple[Any, Any], alone: Path, tmp_path: Path) -> None:
    for number, length in enumerate((8, 64, 21)):
        np.save(tmp_path / f"{number}.npy", wave(length, number))
    (tmp_path / "9.npy").write_bytes(b"no signal")
    (tmp_path / "other.png").touch()
    tower, preprocessor = pair[0].model.signal_tower, pair[1].preprocessors["signal"]
    for what in ("cls", "grid"):
        done = embed([tmp_path], alone, tmp_path / f"{what}.parquet", what=what)
        assert (done.rows, done.unreadable) == (4, 1)
        rows = pq.read_table(tmp_path / f"{what}.parquet").to_pylist()
        assert [*rows[0]] == ["path", "error", "note", "embedding"]
        assert "is no signal" in rows[3]["error"]
        for number, (row, length) in enumerate(zip(rows[:3], (8, 64, 21), strict=True)):
            with torch.no_grad():
                wanted = tower(**preprocessor([wave(length, number)], return_tensors="pt"))[what][0].numpy()
            found = np.array(row["embedding"], np.float32).reshape(-1, 16)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(SourceError, match=r"holds no signal, expected files that end with \.npy"):
        embed([tmp_path / "*.png"], alone, tmp_path / "out.parquet")


def test_of_a_model_of_two_senses_the_encoder_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="its modalities are image, signal; name the one that is meant"):
        load_encoder(folder)
    assert load_encoder(folder, "signal").modality == "signal"


@pytest.mark.new_chats
def test_composed_beside_pictures_by_the_command(
    pair: tuple[Any, Any], alone: Path, site: Path, tmp_path: Path, python: Run
) -> None:
    thinker = tmp_path / "thinker"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(thinker)
    tokenizer = copy.deepcopy(pair[1].tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(thinker)
    vision = tmp_path / "vision"
    pair[0].model.image_tower.save_pretrained(vision)
    pair[1].preprocessors["image"].save_pretrained(vision)
    words = ["compose", "--image", vision, "--signal", alone, "--thinker", thinker, tmp_path / "mine", "--json"]
    # its options are those of the packages that there are when it starts
    options = ["--projector", "signal=linear", "--projector", "image=unshuffle_mlp"]
    run = python("-m", "omni", *words, *options, path=[site])
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["untrained"] == ["image_projector", "signal_projector"]
    config = OmniConfig.from_pretrained(tmp_path / "mine")
    assert {name: section["projector"] for name, section in config.modalities.items()} == {
        "image": "unshuffle_mlp",
        "signal": "linear",
    }
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "mine")
    for name, tensor in pair[0].model.signal_tower.state_dict().items():
        assert torch.equal(model.model.signal_tower.state_dict()[name], tensor), name
    processor = OmniProcessor.from_pretrained(tmp_path / "mine")
    assert batch(processor, ROWS)["signal_values"].shape == (4, 64)


def test_exported_with_several_lengths(folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers", minversion="5.23")
    from omni.exchange.onnx import export

    made = export(folder, tmp_path / "out")
    assert [graph.file.removesuffix(".onnx") for graph in made.graphs] == [
        "image_encoder", "image_projector", "signal_encoder", "signal_projector", "embedding", "thinker",
    ]  # fmt: skip
    encoder = load_encoder(folder, "signal")
    inputs = encoder.prepare([wave(40, 1), wave(12, 2)])
    session = onnxruntime.InferenceSession(tmp_path / "out/signal_encoder.onnx")
    cls, grid = session.run(["cls", "grid"], {key: value.numpy() for key, value in inputs.items()})
    for row, count in enumerate((10, 3)):
        alone = encoder.encode(encoder.prepare([wave((40, 12)[row], row + 1)]))
        np.testing.assert_allclose(cls[row], alone["cls"][0].numpy(), atol=1e-5)
        np.testing.assert_allclose(grid[row, :count], alone["grid"][0].numpy(), atol=1e-5)
