"""Next-token prediction on answers: a fused model learns to answer questions about items."""

import copy
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, EvalPrediction, PreTrainedModel

from omni.checkpoints.fingerprints import part_of
from omni.checkpoints.folder import expect_model
from omni.data.collate import IGNORED, ConversationCollator, expect_taken
from omni.data.conversations import Example, ask
from omni.data.manifests import ManifestConversations
from omni.files import read_json
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.preprocessor import load_preprocessor
from omni.registry import get_modality
from omni.training.adapters import note_base
from omni.training.cache import FrozenTower, TokenCache
from omni.training.order import Mixed, mix
from omni.training.parts import keep_precision, resting_towers
from omni.training.pixels import cross_as_bytes
from omni.training.recipe import Drawn, Files, Mixture, OmniSection, Recipe, said_by_recipe, sources_of
from omni.training.tokenizer import train_tokenizer
from omni.training.unseen import UnseenTokens, loss_without_unseen

NO_ARITHMETIC = {"hidden_dropout_prob", "initializer_range", "fingerprints"}
"""Keys in which two encoders' configurations may differ although the encoders compute the same."""

MOST_ROWS = 20_000
"""The largest number of the user's rows that are read to train the tokenizer of a new Thinker."""

SOME, SHORT = 50, 2
"""The number of examples whose answers are measured, and the largest number of words of a short answer."""

FIRST_ROWS = 1000
"""The largest number of the user's rows that are inspected before the first step."""


class AnswerTraining:
    """The objective "answers": next-token prediction on the answers of conversations."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, OmniSection)
        self.model, self.processor = build_omni(**recipe.model.model_dump(), texts=texts(recipe.train))
        positions = getattr(self.model.config.text_config, "max_position_embeddings", None)
        options = cross_as_bytes(self.model.model, self.processor.preprocessors)
        self._collate = ConversationCollator(self.processor, max_positions=positions, options=options)
        self._unseen = UnseenTokens(self.processor.tokenizer)
        self.model.loss_function = loss_without_unseen
        resting = resting_towers(self.model, recipe)
        self.train, self.evaluate = (self._examples(data, resting) for data in (recipe.train, recipe.evaluate))
        if recipe.lora and recipe.objective == "answers":
            _warn_of_short_answers(self.train)
        if recipe.model.checkpoint and not recipe.lora:
            _warn_of_forgetting(recipe)
        self.processor.prompt = _question(self.train)
        self.processor.asked_by = _asked_by(recipe.train, self.train) or self.processor.asked_by

    def _examples(self, data: Drawn | Files | Mixture | None, resting: Sequence[str]) -> Any:
        """The examples. With a cache, items come encoded if their modality's tower is not trained (`resting`)."""
        if isinstance(data, Mixture):
            return mix(data, lambda part: self._examples(part, resting))
        if not isinstance(data, Files):
            return conversations(data)
        caches = {name: self._cache(name, data) for name in resting} if data.cache else {}
        examples = ManifestConversations(data.manifest(), {name: cache.encode for name, cache in caches.items()})
        for row in islice(examples.manifest, FIRST_ROWS):
            expect_taken(row.source, [file.modality for file in row.files], self.processor.preprocessors)
        return examples

    def _cache(self, name: str, data: Files) -> TokenCache:
        # a copy, which stays on the CPU, in float32 and in eval mode, in every worker that reads files
        tower = copy.deepcopy(getattr(self.model.model, f"{name}_tower")).float().eval()
        frozen = FrozenTower(name, self.model.config.modalities[name], tower, self.processor.preprocessors[name])
        assert data.cache is not None
        return TokenCache(data.cache, frozen, round(data.cache_gigabytes * 1e9))

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch of `ConversationCollator`, with `logits_to_keep` bool[B, L]: true at tokens before a label.

        If an example has unseen words, `unseen` int64[B, L] holds their tokens.
        """
        batch = self._collate(examples)
        batch["logits_to_keep"] = before_labels(batch["labels"])
        if any(example.unseen for example in examples):
            batch["unseen"] = self._unseen(batch["labels"], examples)
        return batch

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Logits float[n, V] -> int64[B, L], see `predicted`."""
        return predicted(logits[0] if isinstance(logits, tuple) else logits, labels)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of answers whose tokens are all predicted right, and that of the best constant answer."""
        answers = [right for row in np.asarray(prediction.predictions) for right in right_answers(row)]
        said = Counter(answer for row in np.asarray(prediction.label_ids) for answer in spoken(row))
        constant = max(said.values(), default=0)
        return {
            name: n / max(len(answers), 1) for name, n in (("exact_match", sum(answers)), ("best_constant", constant))
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the fused model, or its adapters, and the processor."""
        config: Any = model.config
        vars(config).pop("use_cache", None)  # a setting of `Trainer`
        model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel or a PeftModel
        note_base(model, folder)
        self.processor.save_pretrained(folder)


def _warn_of_short_answers(examples: Any) -> None:
    """Warn if most answers are short, because adapters then teach the language model to write only short ones."""
    some = [examples[index] for index in range(0, len(examples), max(1, len(examples) // SOME))]
    said = [message["content"] for example in some for chat in example.conversations for message in chat[1::2]]
    words = median(len("".join(block["text"] for block in content).split()) for content in said)
    if words <= SHORT and all(any(example.items.values()) for example in some):
        warnings.warn(
            f"The language model learns from short answers (in words, median: {words:g}), and may then give only such; mix "
            "in rows of text, or train the projector alone.",
            stacklevel=2,
        )


def _warn_of_forgetting(recipe: Recipe) -> None:
    """Warn if the language model of a checkpoint learns from the user's rows alone."""
    sources = sources_of(recipe.train)
    learns = not any(re.search(pattern, "model.language_model.layers.0") for pattern in recipe.freeze)
    if learns and all(isinstance(data, Files) for data in sources) and len(sources) == 1:
        warnings.warn(
            "The language model learns from these rows alone, so questions that it answered before may be forgotten; to "
            "keep them, mix in rows or scenes of that kind (docs/training.md, What is forgotten).",
            stacklevel=2,
        )


def before_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels int64[B, L] -> bool[B, L]: true at the tokens before a label."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether labels are predicted: int64[B, L] with 1 or 0 at each label, IGNORED elsewhere.

    Args:
        logits: float[n, V], at the n tokens before a label.
        labels: int64[B, L].
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    right = torch.full_like(labels, IGNORED)
    right[following != IGNORED] = (logits.argmax(-1) == following[following != IGNORED]).long()
    return right


def right_answers(row: Any) -> list[bool]:
    """For each answer in a row of `predicted`, int64[L], whether all of its tokens are right."""
    return [all(answer) for answer in spoken(row)]


def spoken(row: Any) -> list[tuple[int, ...]]:
    """The answers in a row of labels, int64[L]: the runs of tokens between those that are `IGNORED`."""
    row = np.asarray(row)
    ends = np.flatnonzero(np.diff((row != IGNORED).astype(int), prepend=0, append=0))
    return [tuple(row[start:end].tolist()) for start, end in ends.reshape(-1, 2)]


def _question(examples: Any) -> str | None:
    """The first question of more than half of the user's first rows; None if there is no such question."""
    asked = list[str]()
    for part in examples.parts if isinstance(examples, Mixed) else [examples]:
        for row in islice(part.manifest, FIRST_ROWS) if isinstance(part, ManifestConversations) else ():
            asked.append("".join(block.get("text", "") for block in row.conversation[0]["content"]).strip())
    question, count = Counter(asked).most_common(1)[0] if asked else ("", 0)
    return question if question and 2 * count > len(asked) else None


def _asked_by(data: Drawn | Files | Mixture, examples: Any) -> list[str]:
    """The modalities that have an item in every message without words. Of files, the first rows are inspected."""
    wordless = list[set[str]]()
    for source, part in zip(
        sources_of(data), examples.parts if isinstance(examples, Mixed) else [examples], strict=True
    ):
        if isinstance(source, Drawn):
            wordless += [{*names}] if (names := source.asked_by()) else []
            continue
        messages = [message for row in islice(part.manifest, FIRST_ROWS) for message in row.conversation]
        for content in (message["content"] for message in messages if message["role"] == "user"):
            if not any(block.get("text", "").strip() for block in content):
                wordless.append({block["type"] for block in content})
    return sorted(set.intersection(*wordless)) if wordless else []


def conversations(data: Drawn | Files | Mixture | None) -> Any:
    """A sequence of examples, from files, from a world, or from a mixture; None for None."""
    if isinstance(data, Mixture):
        return mix(data, conversations)
    return ManifestConversations(data.manifest()) if isinstance(data, Files) else data and data.conversations()


def texts(data: Drawn | Files | Mixture) -> Iterator[str]:
    """Questions and answers in the data. Of files, the first `MOST_ROWS` rows are read."""
    for source in sources_of(data):
        if isinstance(source, Drawn):
            yield from source.texts()
            continue
        for row in islice(source.manifest(), MOST_ROWS):
            for message in row.conversation:
                yield from (block["text"] for block in message["content"] if block["type"] == "text")


def build_omni(
    checkpoint: str | None = None,
    thinker: str | None = None,
    vocab_size: int = 1024,
    modalities: Mapping[str, dict[str, Any]] | None = None,
    image: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    texts: Iterable[str] = (),
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """A fused model to train: a checkpoint, or a new Thinker and new projectors on trained encoders.

    The arguments but `texts` are those of `OmniSection`.

    Args:
        checkpoint: a fused model to continue from.
        thinker: JSON file with the configuration of a language model, which starts from random weights.
        vocab_size: the largest size of the tokenizer that is trained for it on `texts`.
        modalities: the section of each modality by name. Its `encoder` is the folder of a trained encoder and of its
            preprocessor; with a `checkpoint`, both replace those of the checkpoint. Other settings replace those of the
            checkpoint's section, and the projector is then new. A modality that the checkpoint lacks is added.
        image: short for the section of this name.
        config: overrides the configuration of the checkpoint or, for a new model, of all encoders.
        texts: texts that the Thinker will read and write; without any, its tokens are bytes.

    Raises:
        RecipeError: a setting cannot be used; the message names its key.
    """
    sections = {
        name: _Section(f"model.modalities.{name}", name, dict(each)) for name, each in (modalities or {}).items()
    }
    if image is not None:
        sections["image"] = _Section("model.image", "image", dict(image))
    if checkpoint is not None:
        with said_by_recipe("model.checkpoint", checkpoint):
            expect_model(checkpoint, OmniConfig.model_type)
            model = OmniForConditionalGeneration.from_pretrained(checkpoint, **(config or {}))
            if "dtype" not in (config or {}):
                keep_precision(model, checkpoint)
            processor = OmniProcessor.from_pretrained(checkpoint)
        present, changed = set(model.config.modalities), list[_Section]()
        for name, section in sections.items():
            if name not in present:
                model, processor = _with_new_sense(model, processor, section)
                continue
            if "encoder" in section.settings:
                processor.preprocessors[name] = _take_encoder(section, getattr(model.model, f"{name}_tower"))
            if section.settings.keys() - {"encoder"}:
                changed.append(section)
        return _with_new_projectors(model, processor, changed) if changed else (model, processor)
    if thinker is None or not sections:
        raise ValueError("Give a `checkpoint` to go on from, or a `thinker` and `modalities`.")
    with said_by_recipe("model.thinker", thinker):
        text_config = _read_thinker(Path(thinker))
    encoders, preprocessors = dict[str, PreTrainedModel](), dict[str, Any]()
    for name, section in sections.items():
        encoders[name], preprocessors[name] = section.read_encoder(config or {})
    tokens = {name: get_modality(name).token for name in sections}
    tokenizer = train_tokenizer(texts, vocab_size, tokens)
    text_config |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    described = dict[str, Any]()
    for name, section in sections.items():
        described[name] = {
            **section.settings,
            "encoder": encoders[name].config.to_dict(),
            "token_id": tokenizer.convert_tokens_to_ids(tokens[name]),
        }
        with said_by_recipe(section.key, section.settings):
            OmniConfig(modalities={name: described[name]}, text_config=text_config)
    with said_by_recipe("model.thinker", thinker):
        model = OmniForConditionalGeneration(OmniConfig(modalities=described, text_config=text_config))
    for name, encoder in encoders.items():
        getattr(model.model, f"{name}_tower").load_state_dict(encoder.state_dict())
    model.set_attn_implementation(encoder.config._attn_implementation)  # no configuration file holds it
    processor = OmniProcessor(tokenizer=tokenizer, preprocessors=preprocessors, modalities=model.config.modalities)
    return model, processor


@dataclass(frozen=True)
class _Section:
    """A modality's section in a recipe.

    Attributes:
        key: its key in the recipe.
        name: the modality.
        settings: its values.
    """

    key: str
    name: str
    settings: dict[str, Any]

    def read_encoder(self, config: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
        """The trained encoder and its preprocessor, from the folder that `encoder` names."""
        folder = self.settings["encoder"]
        with said_by_recipe(f"{self.key}.encoder", folder):
            modality = get_modality(self.name)
            expect_model(folder, modality.config_class.model_type, OmniConfig.model_type)
            encoder = modality.model_class.from_pretrained(folder, **config)
            return encoder, load_preprocessor(modality, Path(folder))


def _take_encoder(section: _Section, tower: PreTrainedModel) -> Any:
    """Load the weights of an encoder with the same arithmetic into a tower, and return the encoder's preprocessor."""
    encoder, preprocessor = section.read_encoder({})
    with said_by_recipe(f"{section.key}.encoder", section.settings["encoder"]):
        where = f"the {section.name} tower"
        if type(encoder) is not type(tower):
            raise ValueError(f"it is a {type(encoder).__name__}, and {where} a {type(tower).__name__}.")
        differing = [
            f"{name} {getattr(encoder.config, name)!r} where {where} has {getattr(tower.config, name)!r}"
            for name in tower.config_class.__annotations__.keys() - NO_ARITHMETIC
            if getattr(encoder.config, name) != getattr(tower.config, name)
        ]
        if differing:
            raise ValueError(f"it has {', '.join(sorted(differing))}.")
    tower.load_state_dict(encoder.state_dict())
    return preprocessor


def _read_thinker(path: Path) -> dict[str, Any]:
    """The configuration of a language model, which must name its `model_type`."""
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError('expected the JSON configuration of a language model, with a "model_type" such as "qwen3".')
    return values


def _with_new_projectors(
    old: OmniForConditionalGeneration, processor: OmniProcessor, changed: Sequence[_Section]
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    modalities = {name: dict(section) for name, section in old.config.modalities.items()}
    for section in changed:
        changes = {key: value for key, value in section.settings.items() if key != "encoder"}
        if "projector" in changes:  # the factor belongs to the old projector
            modalities[section.name].pop("factor", None)
        if {"projector", "factor", "output"} & changes.keys():
            for key in ("positions", "whitened"):
                modalities[section.name].pop(key, None)
        modalities[section.name] |= changes
        with said_by_recipe(section.key, changes):
            new = OmniForConditionalGeneration(OmniConfig(modalities=modalities, text_config=old.config.text_config))
    fresh = tuple(f"{section.name}_projector" for section in changed)
    kept = {name: tensor for name, tensor in old.state_dict().items() if part_of(name) not in fresh}
    for name, parameter in new.named_parameters():
        if name in kept:
            parameter.data = parameter.data.to(kept[name].dtype)
    new.load_state_dict(new.state_dict() | kept)
    new.set_attn_implementation(old.config._attn_implementation)
    preprocessors, template = processor.preprocessors, processor.chat_template
    return new, OmniProcessor(None, processor.tokenizer, preprocessors, new.config.modalities, template)


def _with_new_sense(
    old: OmniForConditionalGeneration, processor: OmniProcessor, section: _Section
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """The model with one more encoder, a new projector, and a placeholder in the tokenizer and the embedding."""
    name, modality, tokenizer = section.name, get_modality(section.name), processor.tokenizer
    if "encoder" not in section.settings:
        with said_by_recipe(section.key, section.settings):
            raise ValueError(f"the checkpoint has no modality {name!r}, so give the folder of a trained `encoder`.")
    encoder, preprocessor = section.read_encoder({})
    tokenizer.add_special_tokens({"additional_special_tokens": [modality.token]}, replace_extra_special_tokens=False)
    token_id = tokenizer.convert_tokens_to_ids(modality.token)
    template = _template_with(section, processor)
    with said_by_recipe(section.key, section.settings):
        added = {name: {**section.settings, "encoder": encoder.config, "token_id": token_id}}
        old.resize_token_embeddings(max(len(tokenizer), old.config.text_config.vocab_size))
        config = OmniConfig(modalities={**old.config.modalities, **added}, text_config=old.config.text_config)
        new = OmniForConditionalGeneration(config)
    kept = old.state_dict() | {f"model.{name}_tower.{key}": value for key, value in encoder.state_dict().items()}
    for parameter_name, parameter in new.named_parameters():
        if parameter_name in kept:
            parameter.data = parameter.data.to(kept[parameter_name].dtype)
    new.load_state_dict(new.state_dict() | kept)
    new.set_attn_implementation(old.config._attn_implementation)
    new.config.untrained = [*(old.config.untrained or []), f"{name}_projector"]
    tokenizer.chat_template = template
    preprocessors = {**processor.preprocessors, name: preprocessor}
    return new, OmniProcessor(None, tokenizer, preprocessors, new.config.modalities, template)


def _template_with(section: _Section, processor: OmniProcessor) -> str:
    """The chat template with the placeholder of one more modality. omni's templates list them as a JSON object."""
    token = get_modality(section.name).token
    placeholders = {each.name: each.token for each in processor.bundles}
    longer = json.dumps({**placeholders, section.name: token})
    template = str(processor.chat_template).replace(json.dumps(placeholders), longer)
    with said_by_recipe(section.key, section.settings):
        asked = processor.tokenizer.apply_chat_template(
            ask("", items=[section.name]), chat_template=template, tokenize=False
        )
        if token not in asked:
            raise ValueError(f"the chat template of the checkpoint writes no {token} for a block of that type.")
    return template
