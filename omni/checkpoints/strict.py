"""Strict loading: a checkpoint is loaded whole and unchanged, or it raises and names what is wrong.

transformers' `from_pretrained` fills a missing tensor with random numbers and mentions it in a warning. For a model of
several parts that were trained apart this is the classic silent failure: an encoder or projector that is half random
still lets the language model answer fluently. Here every missing, unexpected or mis-shaped tensor is an error, unless
the caller asked for the report (`output_loading_info=True`) or named what may be missing.

A flipped bit, or the tensors of a stranger put among those that were trained together, does not pass either: a saved
configuration carries a fingerprint of each part's weights (`fingerprints.py`), and the files beside them have a seal
(`seal.py`).
"""

import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from .cards import measured_card, remote_code, write_card
from .fingerprints import fingerprint_parts, part_of, safetensors_files, verify_weights, weights_file
from .folder import CONFIG, CheckpointError, named
from .seal import MODEL, on_hub, seal, verify_files

# What transformers itself writes into a config.json or passes on beside the declared fields. Anything else is a typo.
INHERITED_KEYS = frozenset(
    [
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "tie_last_hidden_states",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "use_cache",
    ]
)


_LOADING = threading.RLock()
"""While transformers loads a model, no thread ties weights, and all have its default type; two would spoil each other."""

_room = threading.local()
"""`limit`: of a model that is built in this thread for a checkpoint, how many numbers it may have, and that folder."""

ROOM = 8, 2**24
"""A model has at most so many numbers for each byte of its checkpoint (they may be packed), and so many more."""


class StrictLoadingMixin:
    """`from_pretrained` that raises on anything but a complete, intact checkpoint; stands before `PreTrainedModel`.

    Attributes:
        left_to_others: names of tensors that a checkpoint may hold for another class.
        found_as: for each Auto class the class of omni that it shall find for a saved checkpoint, see `remote_code`.
    """

    left_to_others = re.compile(r"(?!)")
    found_as: Mapping[str, str] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        allow_missing: Iterable[str] = (),
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, and refuse to leave anything at random.

        The folder of a fused model serves its encoders too: `OmniVisionModel.from_pretrained(fused)` takes the tower.

        Args:
            pretrained_model_name_or_path: a folder (or hub name) with safetensors weights.
            allow_missing: regular expressions; a missing tensor whose name one of them matches is initialised at random
                and its part is recorded in `config.untrained`.
            output_loading_info: return `(model, report)` and leave the judgement to the caller, as in transformers.

        Raises:
            CheckpointError: missing, unexpected or mis-shaped tensors, by name; weights that differ from the fingerprints
                that were saved with them, or that are not finite; a file that is damaged, or not as it was sealed.
            OSError: no such folder, or no weights in it.
        """
        kwargs.setdefault("use_safetensors", True)
        mismatched_allowed = kwargs.pop("ignore_mismatched_sizes", False)
        name, variant = pretrained_model_name_or_path, kwargs.get("variant")
        folder = None
        if name is not None:
            place = {key: kwargs[key] for key in WHERE if key in kwargs}
            verify_files(name, MODEL, **place)
            folder = _folder_of(name, place)
        foreign = _take_tower(cls, name, kwargs)
        where = repr(str(name)) if folder is None else named(weights_file(folder, variant))
        try:
            with _LOADING, _room_for(None if allow_missing else folder, variant):
                model, report = super().from_pretrained(  # type: ignore[misc]
                    name,
                    *model_args,
                    output_loading_info=True,
                    # otherwise collected in the report, so that one message names all of them
                    ignore_mismatched_sizes=mismatched_allowed or not output_loading_info,
                    **kwargs,
                )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in {where} are cut off or damaged ({error}); get the file again."
            ) from error
        if output_loading_info:
            return model, report
        if name is None:  # no checkpoint: weights in `state_dict`, the rest is asked to be new
            return model
        if mismatched_allowed:
            report["mismatched_keys"] = []
        allowed = [re.compile(pattern) for pattern in allow_missing]
        excused = {key for key in report["missing_keys"] if any(pattern.search(key) for pattern in allowed)}
        if problems := _problems(model, report, excused, foreign or cls.tensors_of_others(kwargs)):
            raise CheckpointError(_complaint(cls.__name__, where, problems))
        untrained = {part_of(key) for key in excused}
        if untrained:
            model.config.untrained = sorted({*(getattr(model.config, "untrained", None) or []), *untrained})
        if folder is not None:
            verify_weights(folder, variant, untrained)
        return model

    @classmethod
    def tensors_of_others(cls, kwargs: Mapping[str, Any]) -> re.Pattern[str]:
        """Names of tensors that a checkpoint may hold for others, where a model is loaded from it with these arguments."""
        return cls.left_to_others

    def post_init(self) -> None:
        """As in transformers; a model that is far larger than the checkpoint it is for is refused before it gets memory."""
        super().post_init()  # type: ignore[misc]
        most, folder = getattr(_room, "limit", None) or (None, Path())
        tensors = [*self.parameters(), *self.buffers()]  # type: ignore[attr-defined]
        if most is not None and (found := sum(tensor.numel() for tensor in tensors)) > most:
            raise CheckpointError(
                f"{named(folder / CONFIG)} describes a model with {found:,} numbers, far more than the weights beside it "
                "have; get the checkpoint again."
            )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as `PreTrainedModel.save_pretrained` does, with the fingerprints of the weights in the configuration."""
        config = self.config  # type: ignore[attr-defined]
        tensors = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
        # weights that are elsewhere (offloaded, sharded over processes) cannot be hashed here
        whole = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in tensors.values())
        tied = set(getattr(self, "all_tied_weights_keys", None) or {})
        saved = {name: tensor for name, tensor in tensors.items() if name not in tied}
        config.fingerprints = fingerprint_parts(saved) if whole else None
        if self.found_as:
            config.auto_map = remote_code(save_directory, self.found_as)
        # under the names that the tensors have here, which the fingerprints are of: some towers would get older ones
        kwargs.setdefault("save_original_format", False)
        self._card = measured_card(config)  # now: on the way to the hub, transformers overwrites README.md
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.should_save_on_this_rank(kwargs.get("is_main_process", True)):  # type: ignore[attr-defined]
            seal(save_directory, MODEL)
        return result

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: transformers would copy our source files into the next checkpoint; `remote_code` does what is needed."""

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Before a folder goes to the hub, by either of transformers' ways: put the model card and the seal into it."""
        write_card(working_dir, self._card, self.config.model_type)  # type: ignore[attr-defined]
        seal(working_dir, MODEL)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


WHERE = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments of `from_pretrained` that say where a checkpoint is."""


def _folder_of(name: Any, place: Mapping[str, Any]) -> Path | None:
    """The folder with the files of a checkpoint, of one on the hub its copy on this machine; None if there is none."""
    if os.path.isdir(name):
        return Path(name) / (place.get("subfolder") or "")
    config = on_hub(name, CONFIG, place)
    return config.parent if config is not None else None


@contextmanager
def _room_for(folder: Path | None, variant: str | None) -> Iterator[None]:
    """Inside, a model has to be of about the size of the files in this folder."""
    files = [] if folder is None else [file for file in safetensors_files(folder, variant) if file.exists()]
    if folder is not None and files:  # transformers says what is missing
        _room.limit = ROOM[0] * sum(file.stat().st_size for file in files) + ROOM[1], folder
    try:
        yield
    finally:
        _room.limit = None


def _take_tower(cls: Any, folder: Any, kwargs: dict[str, Any]) -> re.Pattern[str] | None:
    """If `folder` holds a fused model with an encoder of this class, arrange that its tower is loaded.

    Returns the pattern of the checkpoint's tensors that belong to others; None for a checkpoint of this class.
    """
    own_type = cls.config_class.model_type
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return None
    where = {key: kwargs[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(folder, **where)
    if not values:  # transformers would take the defaults: a stranger's model of the default size, at random
        raise OSError(f"{str(folder)!r} holds no config.json, or an empty one; expected the folder of a checkpoint.")
    sections = values.get("modalities")
    if not isinstance(sections, dict) or own_type == values.get("model_type"):
        return None
    configs = {name: values.get(f"{name}_config") for name in sections}
    encoders = {
        name: config.get("model_type") if isinstance(config, dict) else None for name, config in configs.items()
    }
    towers = [name for name, model_type in encoders.items() if model_type == own_type]
    if len(towers) != 1:
        raise CheckpointError(
            f"{str(folder)!r} is a fused model with encoders {encoders}; exactly one of them must be {own_type!r} to be "
            f"loaded as {cls.__name__}."
        )
    tower = re.escape(towers[0])
    kwargs["key_mapping"] = {rf"^(model\.)?{tower}_tower\.": ""}
    return re.compile(rf"(model\.)?(?!{tower}_tower\.)(\w+_tower|\w+_projector|language_model)\.|lm_head\.")


def _problems(model: Any, report: Mapping[str, Any], excused: Collection[str], others: re.Pattern[str]) -> list[str]:
    """What is wrong with the tensors of a checkpoint, a line for each; `others` are those of another class."""
    problems = [f"missing: {name}" for name in sorted(set(report["missing_keys"]) - set(excused))]
    problems += [f"unexpected: {name}" for name in sorted(report["unexpected_keys"]) if not others.match(name)]
    problems += [
        f"shape: {name} is {tuple(found)} in the checkpoint and {tuple(expected)} in the model"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    weights = dict(model.named_parameters(remove_duplicate=False))
    problems += [
        f"tied: {name} should be {source}, but the checkpoint holds both; if they are meant to differ, set "
        "tie_word_embeddings to false in config.json, at the top and in text_config"
        for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if name in weights and weights[name] is not weights[source] and weights[name].device.type != "meta"
    ]
    return problems


def _complaint(cls: str, file: str, problems: list[str], shown: int = 20) -> str:
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return (
        f"The weights in {file} do not fit {cls}; tensors that are wrong: {len(problems)}.\n"
        + "\n".join(lines)
        + "\nNothing is left at random: use the checkpoint's own class and configuration, or name what may be missing "
        "with allow_missing=[...] (regular expressions); such a part then counts as untrained."
    )
