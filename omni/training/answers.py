"""Next-token prediction on answers: a fused model learns to answer about what it is shown."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, BaseImageProcessor, EvalPrediction, PreTrainedModel

from omni.checkpoints.folder import expect_model
from omni.data.collate import IGNORED, ConversationCollator
from omni.data.conversations import Example
from omni.data.manifests import Manifest, ManifestConversations
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.encoder import Encoder
from omni.registry import get_modality
from omni.training.adapters import note_base
from omni.training.cache import TokenCache
from omni.training.parts import keep_precision
from omni.training.pixels import AS_BYTES, take_bytes
from omni.training.recipe import Drawn, Files, OmniSection, Recipe, said_by_recipe
from omni.training.tokenizer import train_tokenizer
from omni.training.unseen import UnseenTokens, loss_without_unseen

NO_ARITHMETIC = {"hidden_dropout_prob", "initializer_range", "fingerprints"}
"""What two encoders may have different and still compute the same from the same weights."""

MOST_ROWS = 20_000
"""So many rows of a user's own data are read for the tokenizer of a new Thinker."""


class AnswerTraining:
    """Next-token prediction on answers: the fused model learns to answer about its inputs."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, OmniSection)
        self.model, self.processor = build_omni(**recipe.model.model_dump(), texts=texts(recipe.train))
        positions = getattr(self.model.config.text_config, "max_position_embeddings", None)
        options = {}
        if isinstance(self.processor.preprocessors.get("image"), get_modality("image").preprocessor_class):
            options["image"] = AS_BYTES
            take_bytes(self.model.model, self.processor.image_processor)
        self._collate = ConversationCollator(self.processor, max_positions=positions, options=options)
        self._unseen = UnseenTokens(self.processor.tokenizer)
        self.model.loss_function = loss_without_unseen
        self.train, self.evaluate = self._examples(recipe.train), self._examples(recipe.evaluate)
        self.processor.prompt = _question(self.train)

    def _examples(self, data: Drawn | Files | None) -> Any:
        if not (isinstance(data, Files) and data.cache):
            return conversations(data)
        # a copy: what encodes stays on the CPU, in float32 and in eval mode, in every worker that reads pictures
        tower = copy.deepcopy(self.model.model.image_tower).float().eval()
        outputs = self.model.config.modalities["image"]["output"].split("+")
        encoder = Encoder(tower, self.processor.image_processor)
        cache = TokenCache(data.cache, encoder, outputs, round(data.cache_gigabytes * 1e9))
        return conversations(data, cache.encode)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch as `ConversationCollator` makes it, and bool[B, L]: the tokens before a label need logits, no others.

        Where examples have words that training never shows, `unseen` int64[B, L] are their tokens.
        """
        batch = self._collate(examples)
        batch["logits_to_keep"] = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        if any(example.unseen for example in examples):
            batch["unseen"] = self._unseen(batch["labels"], examples)
        return batch

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """float[n, V] for the n tokens before a label -> int64[B, L]: 1 where it is predicted, 0 where not, else IGNORED."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        right = torch.full_like(labels, IGNORED)
        right[following != IGNORED] = (logits.argmax(-1) == following[following != IGNORED]).long()
        return right

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Share of answers that greedy decoding would get right to the last token."""
        answers = []
        for row in np.asarray(prediction.predictions):
            ends = np.flatnonzero(np.diff((row != IGNORED).astype(int), prepend=0, append=0))
            answers += [bool(row[start:end].all()) for start, end in ends.reshape(-1, 2)]
        return {"exact_match": sum(answers) / max(len(answers), 1)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """The fused model, or its adapters, and the processor."""
        config: Any = model.config
        vars(config).pop("use_cache", None)  # `Trainer` has set it, for itself
        model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel or a PeftModel
        note_base(model, folder)
        self.processor.save_pretrained(folder)


def _question(examples: Any, looked_at: int = 1000) -> str | None:
    """What more than half of the first rows of a user's own data ask first; what a world asks is many things."""
    if not isinstance(examples, ManifestConversations):
        return None
    rows = examples.manifest[:looked_at]
    asked = ["".join(block.get("text", "") for block in row.conversation[0]["content"]).strip() for row in rows]
    question, count = Counter(asked).most_common(1)[0]
    return question if 2 * count > len(rows) else None


def conversations(data: Drawn | Files | None, open_picture: Callable[[Path], Any] | None = None) -> Any:
    """Examples by number: those that a world draws, or a user's own, whose items `open_picture` makes of paths."""
    if data is None:
        return None
    if isinstance(data, Files):
        return ManifestConversations(Manifest.read(data.path, root=data.root, prompt=data.prompt), open_picture)
    return data.conversations()


def texts(data: Drawn | Files) -> Iterator[str]:
    """What is asked and answered in the data, of files in the first `MOST_ROWS` rows."""
    if isinstance(data, Drawn):
        yield from data.texts()
        return
    for row in islice(Manifest.read(data.path, root=data.root, prompt=data.prompt), MOST_ROWS):
        for message in row.conversation:
            yield from (block["text"] for block in message["content"] if block["type"] == "text")


def build_omni(
    checkpoint: str | None = None,
    thinker: str | None = None,
    vocab_size: int = 1024,
    image: dict[str, Any] | None = None,
    modalities: Mapping[str, Mapping[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    texts: Iterable[str] = (),
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """A fused model to train: a checkpoint, or a fresh Thinker and projector on a trained encoder.

    Args:
        checkpoint: go on from this one, with `config` overriding its configuration.
        thinker: JSON file with the configuration of a language model that starts from nothing.
        vocab_size: of the tokenizer that is trained for it on `texts`.
        image: the section of the modality; its `encoder` is the folder of a trained encoder, which comes with its image
            processor. With a `checkpoint` these two replace the checkpoint's, if there is an `encoder`; other settings
            replace those of its section, and the projector is then new. Everything else is kept.
        modalities: sections of modalities that the checkpoint does not have, each with the folder of its `encoder`.
        texts: what the Thinker will read and write; without any, its tokens are bytes.
    """
    if checkpoint is not None:
        with said_by_recipe("model.checkpoint", checkpoint):
            expect_model(checkpoint, OmniConfig.model_type)
            model = OmniForConditionalGeneration.from_pretrained(checkpoint, **(config or {}))
            if "dtype" not in (config or {}):
                keep_precision(model, checkpoint)
            processor = OmniProcessor.from_pretrained(checkpoint)
        changes = dict(image or {})
        if "encoder" in changes:
            processor.image_processor = _take_encoder(model.model.image_tower, changes.pop("encoder"))
        if changes:
            model, processor = _with_new_projector(model, processor, changes)
        for name, section in (modalities or {}).items():
            model, processor = _with_new_sense(model, processor, name, section)
        return model, processor
    if thinker is None or image is None:
        raise ValueError("Give a `checkpoint` to go on from, or a `thinker` and an `image` section.")
    modality = get_modality("image")
    with said_by_recipe("model.thinker", thinker):
        text_config = _read_thinker(Path(thinker))
    encoder, image_processor = _read_encoder(image["encoder"], config or {})
    tokenizer = train_tokenizer(texts, vocab_size, {modality.name: modality.token})
    section = {
        **image,
        "encoder": encoder.config.to_dict(),
        "token_id": tokenizer.convert_tokens_to_ids(modality.token),
    }
    text_config |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    with said_by_recipe("model.image", image):
        made = OmniConfig(modalities={"image": section}, text_config=text_config)
    with said_by_recipe("model.thinker", thinker):
        model = OmniForConditionalGeneration(made)
    model.model.image_tower.load_state_dict(encoder.state_dict())
    model.set_attn_implementation(encoder.config._attn_implementation)  # no saved configuration holds it
    return model, OmniProcessor(image_processor, tokenizer, modalities=model.config.modalities)


def _read_encoder(folder: str, config: dict[str, Any], name: str = "image") -> tuple[PreTrainedModel, Any]:
    modality = get_modality(name)
    with said_by_recipe(f"model.{name}.encoder", folder):
        expect_model(folder, modality.config_class.model_type, OmniConfig.model_type)
        encoder = modality.model_class.from_pretrained(folder, **config)
        return encoder, modality.preprocessor_class.from_pretrained(folder)


def _take_encoder(tower: PreTrainedModel, folder: str) -> BaseImageProcessor:
    """Give an image tower the weights of an encoder that computes as it does, and return the encoder's image processor."""
    encoder, image_processor = _read_encoder(folder, {})
    with said_by_recipe("model.image.encoder", folder):
        if type(encoder) is not type(tower):
            raise ValueError(f"it is a {type(encoder).__name__}, and the image tower a {type(tower).__name__}.")
        differing = [
            f"{name} {getattr(encoder.config, name)!r} where the image tower has {getattr(tower.config, name)!r}"
            for name in tower.config_class.__annotations__.keys() - NO_ARITHMETIC
            if getattr(encoder.config, name) != getattr(tower.config, name)
        ]
        if differing:
            raise ValueError(f"it has {', '.join(sorted(differing))}.")
    tower.load_state_dict(encoder.state_dict())
    return image_processor


def _read_thinker(path: Path) -> dict[str, Any]:
    """The configuration of a language model, which has to name its kind."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError('expected the JSON configuration of a language model, with a "model_type" such as "qwen3".')
    return values


def _with_new_projector(
    old: OmniForConditionalGeneration, processor: OmniProcessor, changes: dict[str, Any]
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    modalities = {name: dict(section) for name, section in old.config.modalities.items()}
    section = modalities["image"]
    if "projector" in changes:
        section.pop("factor", None)  # was of the other projector
    modalities["image"] = section | changes
    with said_by_recipe("model.image", changes):
        new = OmniForConditionalGeneration(OmniConfig(modalities=modalities, text_config=old.config.text_config))
    kept = {name: tensor for name, tensor in old.state_dict().items() if "image_projector" not in name}
    for name, parameter in new.named_parameters():
        if name in kept:
            parameter.data = parameter.data.to(kept[name].dtype)
    new.load_state_dict(new.state_dict() | kept)
    new.set_attn_implementation(old.config._attn_implementation)
    preprocessors, template = processor.preprocessors, processor.chat_template
    return new, OmniProcessor(None, processor.tokenizer, preprocessors, new.config.modalities, template)


def _with_new_sense(
    old: OmniForConditionalGeneration, processor: OmniProcessor, name: str, section: Mapping[str, Any]
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """The same model with an encoder more, a new projector, and a placeholder in the tokenizer and the embedding."""
    encoder, preprocessor = _read_encoder(section["encoder"], {}, name)
    tokenizer, template = processor.tokenizer, processor.chat_template
    known = {each: get_modality(each).token for each in old.config.modalities}
    token = get_modality(name).token
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    token_id = tokenizer.convert_tokens_to_ids(token)
    if isinstance(template, str):  # one of ours lists its blocks; any other takes all of them, or none
        template = tokenizer.chat_template = template.replace(json.dumps(known), json.dumps({**known, name: token}))
    with said_by_recipe(f"model.modalities.{name}", dict(section)):
        if name in old.config.modalities:
            raise ValueError(f"the checkpoint has the modality {name!r} already.")
        old.resize_token_embeddings(max(len(tokenizer), old.config.text_config.vocab_size))
        added = {name: {**section, "encoder": encoder.config, "token_id": token_id}}
        config = OmniConfig(modalities={**old.config.modalities, **added}, text_config=old.config.text_config)
        new = OmniForConditionalGeneration(config)
    kept = old.state_dict() | {f"model.{name}_tower.{key}": value for key, value in encoder.state_dict().items()}
    new.load_state_dict(new.state_dict() | kept)
    new.set_attn_implementation(old.config._attn_implementation)
    new.config.untrained = [*(old.config.untrained or []), f"{name}_projector"]
    preprocessors = {**processor.preprocessors, name: preprocessor}
    return new, OmniProcessor(None, tokenizer, preprocessors, new.config.modalities, template)
