"""Configuration of the fused model: one section per modality, and the language model's own configuration.

    OmniConfig(
        modalities={
            "image": {
                "encoder": {"model_type": "omni_vision", "image_size": 224},
                "token_id": 3,
                "output": "cls+grid",
                "projector": "unshuffle_mlp",
                "factor": 2,
            }
        },
        text_config={"model_type": "qwen3", "hidden_size": 256},
    )

The set of modalities is open, so no class can declare a field for each. `modalities` is a dictionary of sections, and a
section's encoder is a configuration object. The flat names `<name>_config` and `<name>_token_id` read and write the
sections: transformers uses these names for dtype and attention implementation, in `generate`, and in config.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from omni.checkpoints.strict import INHERITED_KEYS
from omni.grids import INTERPOLATIONS
from omni.projectors import PROJECTORS, num_tokens
from omni.registry import get_modality

SECTION_DEFAULTS: dict[str, Any] = {"output": "cls+grid", "projector": "mlp", "factor": 1}
SMALL_THINKER = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
}
"""The default Thinker. transformers' default for this type has eight billion parameters."""
SECTION_KEYS = ("encoder", "token_id", *SECTION_DEFAULTS, "positions", "whitened")


class _SubConfigs:
    """`sub_configs`: the text configuration on the class; on an instance also one per modality."""

    def __get__(self, config: "OmniConfig | None", owner: type) -> dict[str, Any]:
        found: dict[str, Any] = {"text_config": AutoConfig}
        for name, section in (config.__dict__.get("modalities") or {}).items() if config is not None else ():
            found[f"{name}_config"] = type(section["encoder"])
        return found


@strict
class OmniConfig(PreTrainedConfig):
    """Configuration of `OmniModel` and `OmniForConditionalGeneration`.

    Args:
        modalities: for each modality by its registered name: `encoder` (a configuration or its dictionary, of the
            registered encoder or of any other model of that kind), `token_id` (of the placeholder), `output` ("cls",
            "grid" or "cls+grid"), `projector` ("linear", "mlp" or "unshuffle_mlp"), `factor` (its k), `positions` (the
            shape of the projector's table of learned positions, such as [7, 7]) and `whitened` (whether the projector
            whitens its inputs), see `omni.projectors.Projector`. By default, pictures through the ViT-Tiny encoder.
        text_config: configuration of any causal language model.
        tie_word_embeddings: whether the output head shares the input embedding; the text configuration's setting.
        untrained: parts of the model whose weights are random. `generate` refuses to use them.
        fingerprints: a hash of the saved weights of each part.
        parts_from: folders of parts that are not saved with the others, see `parts.py`.

    Raises:
        ValueError: a key, modality, output or projector is unknown (the message lists the known ones), or `token_id` is
            missing.
    """

    model_type = "omni"
    attribute_map: ClassVar[dict[str, str]] = {"vision_config": "image_config"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "encoder_hidden_states"]
    sub_configs = _SubConfigs()
    left_out: ClassVar[Sequence[str]] = ()
    """Modalities of the checkpoint that this configuration leaves out. Loading ignores their tensors."""

    modalities: Any = None
    text_config: Any = None
    initializer_range: float = 0.02
    untrained: list[str] | None = None
    fingerprints: dict[str, str] | None = None
    parts_from: dict[str, str] | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing, as for the models: see `StrictLoadingMixin`."""

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, Mapping):
            self.text_config = _build(self.text_config, "text_config", default="qwen3")
        elif self.text_config is None:
            self.text_config = _build(SMALL_THINKER, "text_config", default="qwen3")
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"A {type(self.text_config).__name__} describes an encoder-decoder; the Thinker is a causal language model."
            )
        if self.modalities is None:  # a config that builds; a real tokenizer decides the placeholder's id
            self.modalities = {"image": {"encoder": {}, "token_id": self.text_config.vocab_size - 1}}
        sections = _merge(self.modalities, self._take_flat(kwargs, self.modalities))
        # sorted, as JSON files are, so that the order of towers, seeds and optimizer states is the same after a reload
        self.modalities = {name: _complete(name, sections[name]) for name in sorted(sections)}
        self.untrained = self.untrained or []
        tie = kwargs.pop("tie_word_embeddings", None)
        if unknown := sorted(set(kwargs) - INHERITED_KEYS):
            known = ["fingerprints", "modalities", "parts_from", "text_config", "tie_word_embeddings", "untrained"]
            known += [f"{name}_{what}" for name in self.modalities for what in ("config", "token_id")]
            raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} for OmniConfig; known: {known}.")
        super().__post_init__(**kwargs)
        if tie is not None:
            self.tie_word_embeddings = tie

    # --- the flat names ---------------------------------------------------------------------------------------------

    @classmethod
    def _flat_name(cls, key: str, modalities: Mapping[str, Any] | None) -> tuple[str, str] | None:
        """("image", "encoder") for "image_config", ("image", "token_id") for "image_token_id"; else None."""
        key = cls.attribute_map.get(key, key)
        for suffix, inner in (("_config", "encoder"), ("_token_id", "token_id")):
            if key.endswith(suffix) and key.removesuffix(suffix) in (modalities or {}):
                return key.removesuffix(suffix), inner
        return None

    @classmethod
    def _take_flat(cls, values: dict[str, Any], modalities: Mapping[str, Any]) -> dict[str, Any]:
        """Take the flat names out of `values`, and return them as changes to sections. An encoder of None removes one."""
        changes: dict[str, Any] = {}
        for key in list(values):
            if (flat := cls._flat_name(key, modalities)) is not None:
                name, inner = flat
                value = values.pop(key)
                if inner == "encoder" and value is None:
                    changes[name] = None
                elif changes.get(name, {}) is not None:
                    changes.setdefault(name, {})[inner] = value
        return changes

    @classmethod
    def names_left_out(cls, kwargs: Mapping[str, Any]) -> list[str]:
        """The modalities that the arguments of `from_pretrained`, or the `config` among them, leave out."""
        if isinstance(kwargs.get("config"), cls):
            return list(kwargs["config"].left_out)
        named = [name for name, section in (kwargs.get("modalities") or {}).items() if section is None]
        flat = [key for key, value in kwargs.items() if value is None and key.endswith("_config")]
        return named + [cls.attribute_map.get(key, key).removesuffix("_config") for key in flat]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for any configuration. Keyword arguments override parts of the dictionary before anything is built.

        `modalities={"image": {"output": "cls"}}` and `image_config={"image_size": 64}` change only that. None leaves a
        modality out, even one whose plug-in is not installed.
        """
        values = dict(config_dict)
        left_out = cls.names_left_out(kwargs)
        for name in left_out:  # parts that are left out are not untrained
            values["untrained"] = [part for part in values.get("untrained") or [] if not part.startswith(f"{name}_")]
        if (saved := values.get("modalities")) is not None:
            sections = _merge(saved, cls._take_flat(values, saved))
            changes = cls._take_flat(kwargs, sections)
            values["modalities"] = _merge(_merge(sections, kwargs.pop("modalities", None) or {}), changes)
        if isinstance(values.get("text_config"), Mapping) and isinstance(kwargs.get("text_config"), Mapping):
            if "tie_word_embeddings" in kwargs["text_config"]:
                values.pop("tie_word_embeddings", None)
            values["text_config"] = _override(values["text_config"], kwargs.pop("text_config"))
        loaded = super().from_dict(values, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).left_out = left_out
        return loaded

    def __getattr__(self, key: str) -> Any:
        if not key.startswith("_"):
            flat = self._flat_name(key, self.__dict__.get("modalities"))
            if flat is not None:
                return self.__dict__["modalities"][flat[0]][flat[1]]
        raise AttributeError(f"{type(self).__name__} has no attribute {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        modalities: Any = self.__dict__.get("modalities")
        if self._flat_name(key, modalities) is None:
            super().__setattr__(key, value)
        else:
            sections = _merge(modalities, self._take_flat({key: value}, modalities))
            self.modalities = {name: _complete(name, section) for name, section in sections.items()}

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether head and embedding share their weight. The setting is stored in `text_config`."""
        return bool(getattr(self.text_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    def __repr__(self) -> str:
        """All values. transformers shows differences only, and builds a default configuration for it on each load."""
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)}"

    # --- the token plan -----------------------------------------------------------------------------------------------

    def num_tokens(self, name: str, grid_shape: tuple[int, ...]) -> int:
        """The number of the Thinker's tokens that an item of this modality becomes, from the shape of its grid.

        Raises:
            ValueError: the factor does not divide the grid.
        """
        section = self.modalities[name]
        return num_tokens(section["output"], section["projector"], section["factor"], grid_shape)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with encoders under their flat names (`image_config`), where transformers looks for parts of a model."""
        output = super().to_dict()
        # any other attribute is no setting, and would be refused when the file is read
        known = {*(field.name for field in fields(self)), *INHERITED_KEYS}
        output = {key: value for key, value in output.items() if key in known}
        for name, section in output["modalities"].items():
            output[f"{name}_config"] = _without_its_folder(section.pop("encoder").to_dict())
        self.dict_dtype_to_str(output)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """As written to disk: only values that differ from the defaults of their part."""
        output = super().to_diff_dict()
        output["tie_word_embeddings"] = self.tie_word_embeddings  # also at the top, where other programs look for it
        output["text_config"] = _without_its_folder(self.text_config.to_diff_dict())
        for name, section in self.modalities.items():
            output[f"{name}_config"] = _without_its_folder(section["encoder"].to_diff_dict())
        return output


def _without_its_folder(values: dict[str, Any]) -> dict[str, Any]:
    """A part's settings without those of its own folder, such as its fingerprint."""
    of_folder = ("transformers_version", "auto_map", "fingerprints")
    return {key: value for key, value in values.items() if key not in of_folder}


def _build(values: Mapping[str, Any], where: str, default: str) -> PreTrainedConfig:
    """A configuration object from its dictionary."""
    model_type = values.get("model_type", default)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"Unknown model_type {model_type!r} in {where}; it must be one that AutoConfig knows.")
    return CONFIG_MAPPING[model_type](**{key: value for key, value in values.items() if key != "model_type"})


def _merge(sections: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with changes to them, by name and key. A change of None removes the section."""
    merged = {name: dict(section) for name, section in sections.items() if section is not None}
    for name, change in changes.items():
        if change is None:
            merged.pop(name, None)
            continue
        section = merged.setdefault(name, {})
        for key, value in change.items():
            if key == "encoder" and isinstance(value, Mapping):
                value = _override(section.get("encoder") or {}, value)
            section[key] = value
    return merged


def _override(old: Mapping[str, Any] | PreTrainedConfig, new: Mapping[str, Any]) -> dict[str, Any] | PreTrainedConfig:
    """An encoder's configuration with new values. If `new` names another model_type, it is the configuration."""
    values = old.to_dict() if isinstance(old, PreTrainedConfig) else dict(old)
    if new.get("model_type", values.get("model_type")) != values.get("model_type"):
        return dict(new)
    if not isinstance(old, PreTrainedConfig):
        return {**values, **new}
    built = type(old)(**{**values, **new})
    built._attn_implementation = old._attn_implementation  # not part of the dictionary
    return built


def _complete(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section with its defaults and with its encoder as an object, after all checks."""
    modality = get_modality(name)
    if unknown := sorted(set(section) - set(SECTION_KEYS)):
        raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} for modality {name!r}; known: {SECTION_KEYS}.")
    complete = {**SECTION_DEFAULTS, **section}
    encoder = complete.get("encoder")
    if not isinstance(encoder, PreTrainedConfig):
        complete["encoder"] = _build(encoder or {}, f"modality {name!r}", default=modality.config_class.model_type)
    if not hasattr(complete["encoder"], "hidden_size"):
        raise ValueError(
            f"The encoder of modality {name!r}, a {type(complete['encoder']).__name__}, has no `hidden_size`; of a model of "
            "several parts give the encoder's configuration, such as clip_vision_model of clip."
        )
    if not isinstance(complete.get("token_id"), int):
        raise ValueError(
            f"The modality {name!r} needs `token_id`, the id of its placeholder {modality.token!r} in the tokenizer; "
            f"found {complete.get('token_id')!r}."
        )
    if complete["output"] not in modality.outputs:
        raise ValueError(f"Unknown output {complete['output']!r} for {name!r}; known: {modality.outputs}.")
    if complete["projector"] not in PROJECTORS:
        raise ValueError(f"Unknown projector {complete['projector']!r} for {name!r}; known: {sorted(PROJECTORS)}.")
    folds = PROJECTORS[complete["projector"]].uses_factor
    if not isinstance(complete["factor"], int) or complete["factor"] < 1 or (complete["factor"] > 1 and not folds):
        raise ValueError(
            f"`factor` of modality {name!r} must be a whole number from 1 on, and 1 unless the projector folds "
            f"neighbourhoods; found {complete['factor']!r} with {complete['projector']!r}."
        )
    _check_positions(name, complete.get("positions"), modality.grid_dims, complete["output"])
    if not isinstance(complete.get("whitened", False), bool):
        raise ValueError(f"`whitened` of modality {name!r} is true or false, found {complete['whitened']!r}.")
    return {key: complete[key] for key in SECTION_KEYS if complete.get(key) is not None}


def _check_positions(name: str, positions: Any, grid_dims: int, output: str) -> None:
    """Refuse a table of positions that does not fit the grid of a modality."""
    if positions is None:
        return
    if grid_dims not in INTERPOLATIONS or "grid" not in output.split("+"):
        raise ValueError(
            f"`positions` of modality {name!r} are for the grid of an encoder with 2 or 3 axes; found {grid_dims} axes and "
            f"the output {output!r}; leave them out."
        )
    sides = positions if isinstance(positions, list | tuple) else ()
    if len(sides) != grid_dims or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(
            f"`positions` of modality {name!r} should be {grid_dims} whole numbers from 1 on, such as "
            f"{[7] * grid_dims}; found {positions!r}."
        )
