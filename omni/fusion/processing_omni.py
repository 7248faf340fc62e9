"""The processor: a prompt with placeholders and raw items of any modality in, a batch for the model out.

    "<image> what shape is it?" + one picture  ->  input_ids with as many <image> ids as the picture has tokens,
                                                   attention_mask, pixel_values

It asks the token plan, `OmniConfig.num_tokens`, how many placeholders an item becomes. The model checks against the same
function. If items and placeholders of a prompt disagree, before or after tokenisation, an error gives both numbers.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput

from omni.modality import Modality
from omni.registry import get_modality, prepare_items

from .chats import flat, items_of_chats, keep_items, opened, refuse_new_chats
from .configuration_omni import OmniConfig
from .encoded_item import EncodedItem
from .placeholders import UNMARKED, check_ids, expand, pattern_of
from .saved_processor import SHOWN_AS, SavedProcessor, as_json


class OmniProcessor(SavedProcessor):
    """Tokenizer and preprocessors of a fused model, as one.

    Args:
        image_processor, feature_extractor: the preprocessors of pictures and of sounds by transformers' names; short for
            `preprocessors={"image": ..., "audio": ...}`.
        tokenizer: a tokenizer that has every placeholder as one token.
        preprocessors: the preprocessor of each modality by name; by default the registered class with its defaults.
        modalities: the `modalities` of the model's `OmniConfig` (or that configuration's dictionary); by default those of
            the first two arguments, with default encoders, else pictures. The placeholders' ids come from the tokenizer.
        chat_template: a Jinja template for `apply_chat_template`; by default the tokenizer's.
        prompt: the most common question of training, which `omni ask` asks by default; None if there is none.
        asked_by: the modalities whose items may ask the question instead of words: `["audio"]` for a model that was trained
            on spoken questions. With an item of each of them, a question may be empty.

    Raises:
        ValueError: a placeholder is not one token, or a preprocessor or a name in `asked_by` has no modality.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        preprocessors: Mapping[str, Any] | None = None,
        modalities: Mapping[str, Any] | None = None,
        chat_template: Any = None,
        prompt: str | None = None,
        asked_by: Sequence[str] | None = None,
        feature_extractor: Any = None,
    ) -> None:
        if tokenizer is None:
            raise ValueError("OmniProcessor needs a tokenizer.")
        self.prompt, self.asked_by = prompt, list(asked_by or [])
        self.tokenizer = tokenizer
        self.chat_template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
        shown = {"image_processor": image_processor, "feature_extractor": feature_extractor}
        named = {SHOWN_AS[key]: preprocessor for key, preprocessor in shown.items() if preprocessor is not None}
        given = {**(preprocessors or {}), **named}
        sections = dict(modalities) if modalities is not None else {name: {} for name in named or ["image"]}
        ids = {name: _placeholder_id(tokenizer, get_modality(name)) for name in sections}
        # copies: they may be the sections of a live model, and a new OmniConfig resets the attention of its encoders
        sections = {name: {**copy.deepcopy(section), "token_id": ids[name]} for name, section in sections.items()}
        self.plan = OmniConfig(modalities=sections)
        self.modalities = as_json(self.plan)
        if strangers := sorted({*self.asked_by} - {*sections}):
            raise ValueError(f"Asked by items of {strangers}, but the modalities are {sorted(sections)}.")
        if strangers := sorted(set(given) - set(sections)):
            raise ValueError(f"Preprocessors for {strangers}, but the modalities are {sorted(sections)}.")
        self.preprocessors = {
            name: given[name] if name in given else get_modality(name).preprocessor_class() for name in sorted(sections)
        }
        self.token_ids = ids
        self.image_token = get_modality("image").token if "image" in sections else None
        self.image_token_id = ids.get("image")
        self.audio_token = get_modality("audio").token if "audio" in sections else None
        self.audio_token_id = ids.get("audio")

    # Preprocessors under transformers' names. They are no properties, because tools take class attributes for settings.

    def __getattr__(self, name: str) -> Any:
        if SHOWN_AS.get(name) in self.__dict__.get("preprocessors", {}):
            return self.preprocessors[SHOWN_AS[name]]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SHOWN_AS:
            self.preprocessors[SHOWN_AS[name]] = value
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        parts = {**self.preprocessors, "tokenizer": self.tokenizer}
        return "\n".join([f"{type(self).__name__}:", *(f"- {name}: {part!r}" for name, part in parts.items())])

    @property
    def bundles(self) -> tuple[Modality, ...]:
        """The modalities that this processor takes, sorted by name."""
        return tuple(get_modality(name) for name in self.preprocessors)

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that a batch may hold."""
        return [*self.tokenizer.model_input_names, *(key for modality in self.bundles for key in modality.inputs)]

    # --- a batch ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        *,
        audio: Any = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Make a batch.

        Args:
            images: pictures for the placeholders `<image>`, in order, flat or nested by row. All items of a modality may
                also be `EncodedItem`s; the batch then holds them under `mm_encoder_outputs`.
            text: one prompt or several.
            audio: sounds for the placeholders `<audio>`, in any form of `omni.audio.sounds.as_sound`.
            kwargs: items of other modalities under their argument (`signals=[...]`), and arguments of the tokenizer and the
                image processor (`padding`, `truncation`, `return_tensors`, `images_kwargs`, ...). `sampling_rate` is the
                rate of sounds in `audio` that come without one.

        Returns:
            `input_ids` int64[B, L], `attention_mask` int64[B, L] and the inputs of every modality given.

        Raises:
            ValueError: the number of placeholders is not the number of items, or truncation cuts into an item.
        """
        items: dict[str, list[Any]] = {}
        named = {"images": images, "audio": audio}
        for modality in self.bundles:
            given = (named if modality.argument in named else kwargs).pop(modality.argument, None)
            if given is not None:
                items[modality.name] = self._flat(modality, given)
        if strangers := [argument for argument, given in named.items() if given is not None]:
            raise ValueError(
                f"This processor takes no {strangers[0]}; its modalities are {sorted(self.preprocessors)}."
            )
        if text is None and not items:
            raise ValueError("Give text, items of a modality, or both.")
        self._hand_on_rate(kwargs)
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        if texts is not None and not all(isinstance(sample, str) for sample in texts):
            raise ValueError("`text` must be a string or a list of strings.")
        own: dict[str, Any] = {f"{modality.argument}_kwargs": {} for modality in self.bundles}
        own |= {key: kwargs.pop(key) for key in own if key in kwargs and key != "images_kwargs"}
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = dict(merged["text_kwargs"])
        return_tensors = text_kwargs.pop("return_tensors", None)

        inputs: dict[str, Any] = {}
        counts: dict[str, list[int]] = {}
        for name, things in items.items():
            options = dict(merged["images_kwargs"]) if name == "image" else own[f"{get_modality(name).argument}_kwargs"]
            options["return_tensors"] = options.get("return_tensors") or return_tensors
            prepared = self.prepare(name, things, options)
            join_inputs(inputs, prepared)
            counts[name] = self.count_tokens(name, prepared)
        data: dict[str, Any] = {}
        if texts is not None:
            type_ids = text_kwargs.pop("return_mm_token_type_ids", False) or merged.get("return_mm_token_type_ids")
            offsets = text_kwargs.pop("return_text_replacement_offsets", False) or merged.get(
                "return_text_replacement_offsets"
            )
            tokens = {modality.name: modality.token for modality in self.bundles}
            expanded = expand(texts, counts, tokens)
            data |= self.tokenizer(expanded, **text_kwargs)
            check_ids(expanded, data["input_ids"], tokens, self.token_ids)
            if offsets:
                data["text_replacement_offsets"] = _replacements(texts, counts, tokens)
            if type_ids:
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        as_they_are = [*self.skip_tensor_conversion, "mm_encoder_outputs"]
        return BatchFeature(data | inputs, tensor_type=return_tensors, skip_tensor_conversion=as_they_are)

    def _hand_on_rate(self, kwargs: dict[str, Any]) -> None:
        """Move `sampling_rate` into `audio_kwargs`, for the preprocessor of sounds."""
        if (rate := kwargs.pop("sampling_rate", None)) is None:
            return
        if not any(modality.argument == "audio" for modality in self.bundles):
            raise ValueError(f"`sampling_rate` is of sounds; this processor takes {sorted(self.preprocessors)}.")
        kwargs["audio_kwargs"] = given = {"sampling_rate": rate, **(kwargs.get("audio_kwargs") or {})}
        if given["sampling_rate"] != rate:
            raise ValueError(
                f"`sampling_rate` was given as {rate} and, in `audio_kwargs`, as {given['sampling_rate']}."
            )

    def _flat(self, modality: Modality, given: Any) -> list[Any]:
        """The items in the order of their placeholders, from one item, a list, or a list per row."""
        if modality.name == "image" and not any(isinstance(item, EncodedItem) for item in flat(modality, given)):
            return list(make_flat_list_of_images(self.image_processor.fetch_images(opened(modality, given))))
        return list(flat(modality, given))

    def prepare(self, name: str, items: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        """The modality's inputs from raw items; encoded items are passed through.

        Raises:
            ValueError: only some of the items are encoded.
        """
        if encoded := [item for item in items if isinstance(item, EncodedItem)]:
            if len(encoded) < len(items):
                raise ValueError(
                    f"Of {len(items)} items of modality {name!r}, {len(encoded)} are encoded already; expected all or none "
                    "of them. Encode the others too, with `encode_items`."
                )
            return {"mm_encoder_outputs": {name: encoded}}
        options = {key: value for key, value in options.items() if value is not None}
        return prepare_items(get_modality(name), self.preprocessors[name], items, options)

    def count_tokens(self, name: str, prepared: Mapping[str, Any]) -> list[int]:
        """The number of placeholders of each item, by the token plan."""
        if encoded := prepared.get("mm_encoder_outputs", {}).get(name):
            return [self.plan.num_tokens(name, item.grid_shape) for item in encoded]
        shapes = get_modality(name).grid_shapes(self.plan.modalities[name]["encoder"], prepared)
        return [self.plan.num_tokens(name, tuple(shape)) for shape in shapes]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; an item of any class stays what it is. Before transformers 5.23 some chats are refused.

        Raises:
            OldTransformers: see `refuse_new_chats`.
        """
        if not UNMARKED:
            refuse_new_chats(conversation, kwargs, self.bundles, self.tokenizer)
        return super().apply_chat_template(keep_items(conversation, self.preprocessors), *args, **kwargs)

    # --- for tools and servers ----------------------------------------------------------------------------------------

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders that stand for one picture."""
        return self._replacement("image", image_inputs, image_idx)

    def replace_audio_token(self, audio_inputs: Mapping[str, Any], audio_idx: int, **kwargs: Any) -> str:
        """The placeholders that stand for one sound."""
        return self._replacement("audio", audio_inputs, audio_idx)

    def _replacement(self, name: str, inputs: Mapping[str, Any], index: int) -> str:
        modality = get_modality(name)
        one = {key: [inputs[key][index]] for key in modality.inputs}
        return modality.token * self.count_tokens(name, one)[0]

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, audio_lengths: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """Numbers of tokens that servers reserve before they see the items.

        Args:
            image_sizes: (height, width) of each picture.
            audio_lengths: samples of each sound, at the rate of the feature extractor.
            kwargs: settings of the image processor.

        Raises:
            ValueError: the image processor has no fixed size.
        """
        data: dict[str, Any] = {}
        if image_sizes is not None:
            crops = kwargs.get("do_center_crop", getattr(self.image_processor, "do_center_crop", None))
            what = "crop_size" if crops else "size"
            size = dict(kwargs.get(what) or getattr(self.image_processor, what))
            if not size.get("height") or not size.get("width"):
                raise ValueError(
                    f"The number of tokens of a picture is not known: {what} of the image processor is {size}."
                )
            blank = np.empty((3, size["height"], size["width"]), np.uint8)  # only its shape is read
            count = self.count_tokens("image", {"pixel_values": [blank]})[0]
            data = {"num_image_tokens": [count] * len(image_sizes), "num_image_patches": [1] * len(image_sizes)}
        if audio_lengths is not None:
            silence = [np.zeros(length, np.float32) for length in audio_lengths]
            data["num_audio_tokens"] = self.count_tokens("audio", self.prepare("audio", silence, {})) if silence else []
        return MultiModalData(**data)

    def least_tokens(self, name: str) -> int:
        """The smallest number of tokens that an item of a modality becomes. Pictures all have the same number."""
        if name == "image":
            return int(self._get_num_multimodal_tokens(image_sizes=[(1, 1)])["num_image_tokens"][0])
        return self.plan.num_tokens(name, (1,) * get_modality(name).grid_dims)

    def _multimodal_inputs_from_conversations(self, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        """The items of chats by the type of their blocks, in the form in which transformers passes them to `__call__`."""
        rows, found = len(conversations), items_of_chats(self.bundles, conversations)
        images, videos = (found.pop(argument, [[] for _ in range(rows)]) for argument in ("images", "videos"))
        flat = {argument: [item for row in items for item in row] for argument, items in found.items()}
        audio = flat.pop("audio", [])
        return images, videos, audio, {argument: items for argument, items in flat.items() if items}

    def _resolve_audio_loading_params(self, processor_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The rate of a chat's sounds, if it was given. transformers would assume one, which may be wrong."""
        nested = processor_kwargs.get("audio_kwargs") or {}
        return {"sampling_rate": processor_kwargs.get("sampling_rate", nested.get("sampling_rate"))}


def _placeholder_id(tokenizer: Any, modality: Modality) -> int:
    ids = tokenizer.encode(modality.token, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids)[0] != modality.token:
        raise ValueError(
            f"The placeholder {modality.token!r} of modality {modality.name!r} must be one token of the tokenizer; it is "
            f"{len(ids)}. Add it with tokenizer.add_special_tokens({{'additional_special_tokens': [{modality.token!r}]}}) "
            "and resize the language model's embedding."
        )
    return int(ids[0])


def _replacements(
    texts: Sequence[str], counts: Mapping[str, Sequence[int]], tokens: Mapping[str, str]
) -> list[list[dict[str, Any]]]:
    """For each prompt, its placeholders and their repetitions in the expanded prompt, as spans of characters."""
    names, waiting = (
        {token: name for name, token in tokens.items()},
        {name: iter(each) for name, each in counts.items()},
    )
    found = []
    for text in texts:
        shift, row = 0, list[dict[str, Any]]()
        for match in pattern_of(names).finditer(text):
            token, start = match[0], match.start() + shift
            repeated = token * next(waiting[names[token]])
            span = {"span": match.span(), "new_span": (start, start + len(repeated))}
            row.append({"type": names[token], **span, "text": token, "replacement": repeated})
            shift += len(repeated) - len(token)
        found.append(row)
    return found


def join_inputs(batch: dict[str, Any], prepared: Mapping[str, Any]) -> None:
    """Add one modality's inputs to a batch. Encoded items of all modalities go under `mm_encoder_outputs`."""
    encoded = {**batch.get("mm_encoder_outputs", {}), **prepared.get("mm_encoder_outputs", {})}
    batch |= {**prepared, **({"mm_encoder_outputs": encoded} if encoded else {})}
