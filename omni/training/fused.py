"""The fused model of a recipe: a checkpoint, perhaps with other encoders, or a new Thinker on trained encoders."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel

from omni.checkpoints.fingerprints import part_of
from omni.checkpoints.folder import expect_model
from omni.data.conversations import ask
from omni.files import read_json
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.preprocessor import load_preprocessor
from omni.registry import get_modality
from omni.training.parts import keep_precision
from omni.training.recipe import said_by_recipe
from omni.training.tokenizer import train_tokenizer

NO_ARITHMETIC = {"hidden_dropout_prob", "initializer_range", "fingerprints"}
"""Keys in which two encoders' configurations may differ although the encoders compute the same."""


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
        return _from_checkpoint(checkpoint, sections, config or {})
    if thinker is None or not sections:
        raise ValueError("Give a `checkpoint` to go on from, or a `thinker` and `modalities`.")
    return _from_encoders(thinker, vocab_size, sections, config or {}, texts)


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


def _from_checkpoint(
    checkpoint: str, sections: Mapping[str, _Section], config: dict[str, Any]
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """A fused model to continue from, with the changes of these sections."""
    with said_by_recipe("model.checkpoint", checkpoint):
        expect_model(checkpoint, OmniConfig.model_type)
        model = OmniForConditionalGeneration.from_pretrained(checkpoint, **config)
        if "dtype" not in config:
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


def _from_encoders(
    thinker: str, vocab_size: int, sections: Mapping[str, _Section], config: dict[str, Any], texts: Iterable[str]
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """A new Thinker and new projectors on trained encoders, with a tokenizer for these texts."""
    with said_by_recipe("model.thinker", thinker):
        text_config = _read_thinker(Path(thinker))
    encoders, preprocessors = dict[str, PreTrainedModel](), dict[str, Any]()
    for name, section in sections.items():
        encoders[name], preprocessors[name] = section.read_encoder(config)
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
