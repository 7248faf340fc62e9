"""What is learnt: objects with a model, examples, a loss and scores, of which the training loop knows nothing more."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from omni.data import scenes
from omni.data.collate import IGNORED, ConversationCollator
from omni.data.conversations import SceneConversations
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.registry import get_modality
from omni.training.recipe import EncoderSection, Recipe
from omni.training.tokenizer import train_tokenizer

PATCH_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": scenes.SHAPES,
    "color": scenes.COLORS,
    "size": scenes.SIZES,
    "pattern": scenes.PATTERNS,
    "place": scenes.PLACES,
}
SCENE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": scenes.BACKGROUNDS,
    "dark": ("light", "dark"),
    "count": tuple(str(n) for n in range(1, 10)),
}
NOTHING = len(scenes.SHAPES)  # the "shape" of a patch that nothing covers; no other attribute has as many values


class DenseModel(nn.Module):
    """An encoder with heads: every patch names the shape, colour, size, pattern and place of the object on it, or nothing.

    The CLS token names the kind and brightness of the background and the number of objects. One linear layer reads all
    of it off the encoder's output and is thrown away afterwards.
    """

    def __init__(self, encoder: PreTrainedModel, image_processor: BaseImageProcessor) -> None:
        super().__init__()
        self.encoder = encoder
        self.rescale_factor = image_processor.rescale_factor
        for name, values in (("mean", image_processor.image_mean), ("std", image_processor.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        width = encoder.config.hidden_size
        self.patch_sizes = [len(values) + (name == "shape") for name, values in PATCH_ATTRIBUTES.items()]  # + "nothing"
        self.scene_sizes = [len(values) for values in SCENE_ATTRIBUTES.values()]
        self.heads = nn.ModuleDict(
            {"patch": nn.Linear(width, sum(self.patch_sizes)), "scene": nn.Linear(width, sum(self.scene_sizes))}
        )

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, scene_labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Args: pixel_values uint8[B, 3, H, W], labels int64[B, 5, N], scene_labels int64[B, 3].

        Returns `loss` and `scores` float[B, 8, 2]: right answers and questions of each attribute in each picture.
        """
        encoded = self.encoder((pixel_values.float() * self.rescale_factor - self.mean) / self.std)
        patch_logits = self.heads["patch"](encoded.grid).float().split(self.patch_sizes, dim=-1)
        scene_logits = self.heads["scene"](encoded.cls).float().split(self.scene_sizes, dim=-1)
        losses, scores = [], []
        answers = [*labels.unbind(1), *(answer[:, None] for answer in scene_labels.unbind(1))]
        for logits, answer in zip((*patch_logits, *scene_logits), answers, strict=True):
            losses.append(F.cross_entropy(rearrange(logits, "b n k -> b k n"), answer, ignore_index=IGNORED))
            asked = (answer != IGNORED) & (answer != NOTHING)
            right = (logits.argmax(-1) == answer) & asked
            scores.append(torch.stack([right.sum(1), asked.sum(1)], dim=-1))
        return {"loss": torch.stack(losses).mean(), "scores": torch.stack(scores, dim=1).float()}


class DenseScenes(torch.utils.data.Dataset[dict[str, Any]]):
    """Scene `i` and the labels of its patches, made when asked for."""

    def __init__(
        self, split: str, length: int, image_processor: BaseImageProcessor, first: int = 0, **scene_options: Any
    ) -> None:
        self.split, self.length, self.first = split, length, first
        self.image_processor, self.scene_options = image_processor, scene_options

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = scenes.sample_scene(self.first + index, self.split, **self.scene_options)
        picture, owner = scenes.render_with_map(scene)
        return {
            "pixel_values": self._pixels(picture),
            "labels": patch_labels(scene, owner),
            "scene_labels": scene_labels(scene),
        }

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        # bytes until they are in the training process: a quarter of the memory to move
        made = self.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt")
        return made["pixel_values"][0].to(torch.uint8)


def patch_labels(scene: scenes.Scene, owner: np.ndarray) -> torch.Tensor:
    """Labels int64[5, N] from the index of the object on each patch, int64[14, 14] (-1: none)."""
    table = np.full((5, len(scene.objects) + 1), IGNORED)  # the last column is for patches that nothing covers
    for i, thing in enumerate(scene.objects):
        for row, (name, values) in enumerate(PATCH_ATTRIBUTES.items()):
            value = scenes.PLACES[thing.place] if name == "place" else getattr(thing, name)
            if value in values:  # a neutral colour has no name
                table[row, i] = values.index(value)
    table[0, -1] = NOTHING
    return torch.from_numpy(table[:, owner.ravel()])


def scene_labels(scene: scenes.Scene) -> torch.Tensor:
    """Labels int64[3]: background, dark, count."""
    return torch.tensor([scenes.BACKGROUNDS.index(scene.background), int(scene.dark), len(scene.objects) - 1])


class Objective(Protocol):
    """What the training loop needs: a model that returns a loss, its processor, data, and what to make of outputs."""

    model: nn.Module
    processor: Any
    train: Any
    evaluate: Any
    collate: Any

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Outputs of an evaluation step to what `metrics` needs of them."""

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores of an evaluation."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the finished checkpoint."""


class DensePretraining:
    """Supervised pretraining of an encoder on scenes; keeps the encoder and throws the heads away."""

    collate = None

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.model
        modality = get_modality("image")
        self.processor = modality.preprocessor_class()
        assert isinstance(section, EncoderSection)
        start, config = section.encoder, section.config
        encoder = (
            modality.model_class.from_pretrained(start, **config)
            if start
            else modality.model_class(modality.config_class(**config))
        )
        self.model = DenseModel(encoder, self.processor)
        self.train, self.evaluate = (
            DenseScenes(data.split, data.count, self.processor, data.first, **data.scene_options())
            for data in (recipe.train, recipe.evaluate)
        )

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """`scores` float[B, 8, 2] are small already."""
        return logits

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of each attribute, over patches or pictures."""
        right, asked = np.asarray(prediction.predictions).sum(0).T
        names = (*PATCH_ATTRIBUTES, *SCENE_ATTRIBUTES)
        return dict(zip(names, (right / np.maximum(asked, 1)).tolist(), strict=True))

    def save(self, model: nn.Module, folder: Path) -> None:
        """The encoder and its image processor."""
        assert isinstance(model, DenseModel)
        model.encoder.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class AnswerTraining:
    """Next-token prediction on answers: the fused model learns to answer about its inputs."""

    def __init__(self, recipe: Recipe) -> None:
        self.model, self.processor = build_omni(**recipe.model.model_dump())
        self.collate = ConversationCollator(self.processor)
        self.train, self.evaluate = (
            SceneConversations(data.split, data.count, data.first, data.questions, data.kinds, **data.scene_options())
            for data in (recipe.train, recipe.evaluate)
        )

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """float[B, L, V] -> the predicted id of the *next* token, int64[B, L]."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Share of answers that greedy decoding would get right to the last token."""
        predicted = np.asarray(prediction.predictions)[:, :-1]
        labels = np.asarray(prediction.label_ids)[:, 1:]
        right = answers = 0
        for row, wanted in zip(predicted, labels, strict=True):
            asked = np.concatenate([[0], (wanted != IGNORED).astype(int), [0]])
            starts, ends = np.flatnonzero(np.diff(asked) == 1), np.flatnonzero(np.diff(asked) == -1)
            answers += len(starts)
            right += sum(bool((row[a:b] == wanted[a:b]).all()) for a, b in zip(starts, ends, strict=True))
        return {"exact_match": right / max(answers, 1)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """The fused model and its processor."""
        assert isinstance(model, OmniForConditionalGeneration)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def build_omni(
    checkpoint: str | None = None,
    thinker: str | None = None,
    vocab_size: int = 1024,
    image: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """A fused model to train: a checkpoint, or a fresh Thinker and projector on a trained encoder.

    Args:
        checkpoint: go on from this one, with `config` overriding its configuration.
        thinker: JSON file with the configuration of a language model that starts from nothing.
        vocab_size: of the tokenizer that is trained for it on the text of scenes.
        image: the section of the modality; its `encoder` is the folder of a trained encoder.
    """
    if checkpoint is not None:
        model = OmniForConditionalGeneration.from_pretrained(checkpoint, **(config or {}))
        return model, OmniProcessor.from_pretrained(checkpoint)
    if thinker is None or image is None:
        raise ValueError("Give a `checkpoint` to go on from, or a `thinker` and an `image` section.")
    modality = get_modality("image")
    texts = (text for seed in range(4000) for text in _scene_text(seed))
    tokenizer = train_tokenizer(texts, vocab_size, [modality.token])
    encoder = modality.model_class.from_pretrained(image["encoder"], **(config or {}))
    section = {
        **image,
        "encoder": encoder.config.to_dict(),
        "token_id": tokenizer.convert_tokens_to_ids(modality.token),
    }
    text_config = json.loads(Path(thinker).read_text(encoding="utf-8"))
    text_config |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    model = OmniForConditionalGeneration(OmniConfig(modalities={"image": section}, text_config=text_config))
    model.model.image_tower.load_state_dict(encoder.state_dict())
    return model, OmniProcessor(tokenizer=tokenizer, modalities=model.config.modalities)


def _scene_text(seed: int) -> list[str]:
    scene = scenes.sample_scene(seed, "train")
    return [text for question in scenes.questions(scene, seed) for text in (question.text, question.answer)]


OBJECTIVES: dict[str, type[Any]] = {"dense": DensePretraining, "answers": AnswerTraining}
