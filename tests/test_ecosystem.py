"""Trainer and pipelines take the fused model for one of transformers' own."""

import contextlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments, default_data_collator, pipeline

from omni import OmniForConditionalGeneration, OmniImageProcessor, OmniProcessor, OmniVisionConfig, OmniVisionModel
from omni.data.collate import ConversationCollator
from omni.data.conversations import Example, ask
from omni.training.parts import CHECKPOINTING

Pair = Callable[..., tuple[Any, Any]]
COLOURS = {"a red circle": (255, 0, 0), "blue square": (0, 0, 255)}


def photo(colour: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.full((20, 20, 3), colour, dtype=np.uint8))


def examples() -> list[Example]:
    """Same question, other picture, other answer: nothing but the picture can tell."""
    return [Example({"image": [photo(c)]}, [ask("what shape is it", answer)]) for answer, c in COLOURS.items()]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    values = {
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **values)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- Trainer ----------------------------------------------------------------------------------------------------------


def test_trainer_learns_from_conversations(make_pair: Pair, tmp_path: Path) -> None:
    model, processor = make_pair()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", bf16=True),
        train_dataset=examples(),
        eval_dataset=examples(),
        data_collator=ConversationCollator(processor),
        processing_class=processor,
    )
    assert trainer.args.remove_unused_columns
    trainer.train()
    assert losses(trainer)[-1] < 0.1 < 1.0 < losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] < 0.1
    predicted = trainer.predict(examples())
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape

    trainer.save_model(str(tmp_path / "done"))
    loaded = OmniForConditionalGeneration.from_pretrained(tmp_path / "done")
    again = OmniProcessor.from_pretrained(tmp_path / "done")
    for answer, colour in COLOURS.items():
        prompt = "<|user|><image>what shape is it<|assistant|>"
        inputs = again(text=prompt, images=photo(colour), return_tensors="pt")
        out = loaded.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert again.decode(out, skip_special_tokens=True) == answer


def test_trainer_keeps_the_pictures_of_a_table(make_pair: Pair, tmp_path: Path) -> None:
    """Trainer drops columns that forward does not name; without pixel_values the model would have to guess."""
    model, processor = make_pair()
    rows = []
    for answer, colour in COLOURS.items():
        prompt = f"<image>{answer}<|end|>"
        inputs = processor(text=prompt, images=photo(colour), padding="max_length", max_length=16, return_tensors="np")
        row = {key: inputs[key][0] for key in ("input_ids", "attention_mask", "pixel_values")}
        labels = np.where(row["attention_mask"] == 1, row["input_ids"], -100)
        rows.append({**row, "labels": np.where(labels == processor.image_token_id, -100, labels), "note": answer})
    before = model.model.image_tower.norm.weight.clone()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **{CHECKPOINTING: True}),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.1
    assert not model.model.image_tower.norm.weight.equal(before)


def test_accumulated_batches_are_one_batch(make_pair: Pair, tmp_path: Path) -> None:
    """Answers of different lengths: every token must count the same, whatever batch it fell into."""
    found = []
    for size, steps in ((2, 1), (1, 2)):
        model, processor = make_pair()
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "hidden_dropout_prob"):
                module.config.hidden_dropout_prob = 0.0
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            train_dataset=examples(),
            data_collator=ConversationCollator(processor),
        )
        trainer.train()
        found.append((losses(trainer)[0], model.lm_head.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-3, rtol=1e-2)


# --- Pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_pair: Pair, tmp_path: Path) -> Path:
    for part in make_pair():
        part.save_pretrained(tmp_path)
    return tmp_path


def test_pipeline_image_text_to_text(folder: Path) -> None:
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert isinstance(pipe.model, OmniForConditionalGeneration)
    options: dict[str, Any] = {"max_new_tokens": 4, "return_full_text": False, "do_sample": False}
    prompt, image = "<|user|><image>how many<|assistant|>", photo((9, 99, 200))
    one = pipe(images=image, text=prompt, **options)[0]["generated_text"]
    content = [{"type": "image", "image": image}, {"type": "text", "text": "how many"}]
    (chat,) = pipe(text=[{"role": "user", "content": content}], **options)
    assert chat["generated_text"] == one
    batch = pipe(images=[[image], [image]], text=[prompt, prompt], batch_size=2, **options)
    texts = [(answer[0] if isinstance(answer, list) else answer)["generated_text"] for answer in batch]
    assert texts == [one, one]


@pytest.mark.parametrize("checkpoint", ["vision_tiny", "omni_tiny"])
def test_nothing_asks_whether_to_run_code(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint brings code for those who have not imported omni. Here it is imported."""

    def asked(question: str = "") -> str:
        questions.append(question)
        return "n"

    questions: list[str] = []
    monkeypatch.setattr("builtins.input", asked)
    folder = f"checkpoints/{checkpoint}"
    autos = [
        "configuration",
        "feature_extraction",
        "image_processing",
        "modeling",
        "processing",
        "tokenization",
        "video_processing",
    ]
    classes = [
        cls
        for auto in autos
        for name, cls in vars(import_module(f"transformers.models.auto.{auto}_auto")).items()
        if name.startswith("Auto") and hasattr(cls, "from_pretrained") and hasattr(cls, "register")
    ]
    assert len(classes) > 30
    loaded = set()
    for cls in classes:
        with contextlib.suppress(ValueError, OSError, TypeError):
            loaded.add(type(cls.from_pretrained(folder)).__name__)
    tasks = ("image-feature-extraction", "feature-extraction", "image-text-to-text", "any-to-any")
    for task in tasks:
        with contextlib.suppress(ValueError, OSError, ImportError):
            loaded.add(type(pipeline(task, folder)).__name__)
    encoder, fused = ("OmniVisionModel", "ImageFeatureExtraction"), ("OmniForConditionalGeneration", "ImageTextToText")
    model, task = fused if checkpoint == "omni_tiny" else encoder
    assert loaded >= {model, f"{task}Pipeline"}
    assert not questions


def test_pipeline_image_feature_extraction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = OmniVisionModel(
        OmniVisionConfig(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    encoder.save_pretrained(tmp_path)
    processor = OmniImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    image = photo((9, 99, 200))
    with torch.no_grad():
        expected = encoder(**processor(image, return_tensors="pt"))
    pipe = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    torch.testing.assert_close(torch.tensor(pipe(image)), expected.last_hidden_state)
    torch.testing.assert_close(torch.tensor(pipe(image, pool=True)), expected.pooler_output)
