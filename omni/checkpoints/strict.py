"""Strict loading: a checkpoint is loaded whole and unchanged, or an error names what is wrong.

transformers' `from_pretrained` fills a missing tensor with random numbers and warns. In a model of several parts this is
the classic silent failure: with a half-random encoder or projector, the language model still answers fluently. Here every
missing, unexpected or mis-shaped tensor is an error, unless the caller asks for the report (`output_loading_info=True`) or
names the tensors that may be missing.

A flipped bit, or a part from another model, is an error as well. A saved configuration holds a fingerprint of each part's
weights (`fingerprints.py`), and the other files have a seal (`seal.py`).
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
from transformers import GenerationConfig, PreTrainedConfig

from .cards import measured_card, remote_code, write_card
from .fingerprints import fingerprint_parts, part_of, safetensors_files, verify_tensors, verify_weights, weights_file
from .folder import CONFIG, CheckpointError, named
from .seal import GENERATION, MODEL, on_hub, seal, verify_files

# Keys beside the declared fields that transformers writes into a config.json or passes on. Any other key is a mistake.
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
"""One thread loads a model at a time. Meanwhile transformers changes settings of all threads: the default type, and whether
weights are tied."""

_room = threading.local()
"""`limit`: how many numbers a model may have that this thread builds for a checkpoint, and the folder of that checkpoint."""

ROOM = 8, 2**24
"""How many numbers a model may have for each byte of its checkpoint (a byte may hold several), and how many on top."""


class StrictLoadingMixin:
    """`from_pretrained` that raises unless the checkpoint is complete and intact.

    In a list of base classes it comes before `PreTrainedModel`.

    Attributes:
        left_to_others: names of tensors that a checkpoint may hold for another class.
        found_as: for each Auto class, the class of omni that it returns for a saved checkpoint; see `remote_code`.
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
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, and refuse one that would leave weights random.

        The folder of a fused model also serves its encoders: `OmniVisionModel.from_pretrained(fused)` loads the tower.

        Args:
            pretrained_model_name_or_path: a folder (or hub name) with safetensors weights.
            allow_missing: regular expressions. A missing tensor may be random if one of them matches its name; its part is
                then listed in `config.untrained`.
            output_loading_info: return `(model, report)` without an error, as in transformers.

        Raises:
            CheckpointError: a tensor is missing, unexpected or mis-shaped; a part's weights do not have the fingerprint
                that was saved with them, or are not finite; a file is damaged, or has changed since it was sealed.
            OSError: there is no such folder, or it holds no weights.
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
        gathered = None if folder is None or foreign else cls.gather(folder, kwargs)
        try:
            with _LOADING, _room_for(None if allow_missing else folder, variant, gathered):
                model, report = super().from_pretrained(  # type: ignore[misc]
                    name if gathered is None else None,
                    *model_args,
                    output_loading_info=True,
                    # without this they are collected in the report, so that one message names all of them
                    ignore_mismatched_sizes=mismatched_allowed or not output_loading_info,
                    **kwargs,
                )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in {where} are cut off or damaged ({error}); get the file again."
            ) from error
        if output_loading_info:
            return model, report
        if name is None:  # no checkpoint: weights come from `state_dict`, and the caller wants the rest new
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
        if gathered is not None:
            assert folder is not None
            verify_tensors(gathered, model.config.fingerprints, where, untrained, model.config.parts_from)
            model.name_or_path = model.config.name_or_path = str(name)
            if (folder / GENERATION).is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
        elif folder is not None:
            verify_weights(folder, variant, untrained)
        return model

    @classmethod
    def gather(cls, folder: Path, kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """All tensors of a checkpoint whose parts are in several folders; None if all are in one folder.

        Args:
            folder: the folder of the checkpoint.
            kwargs: arguments of `from_pretrained`. The configuration and the tensors are added.
        """
        return None

    @contextmanager
    def apart(self, tensors: Mapping[str, torch.Tensor], save_directory: Any) -> Iterator[dict[str, dict[str, str]]]:
        """The parts that are not saved because they stay in their own folders, each with its fingerprints there.

        Inside, the configuration holds their paths relative to `save_directory`.
        """
        yield {}

    @classmethod
    def tensors_of_others(cls, kwargs: Mapping[str, Any]) -> re.Pattern[str]:
        """A pattern of tensors that a checkpoint may hold for other classes, given the arguments of `from_pretrained`."""
        return cls.left_to_others

    def post_init(self) -> None:
        """As in transformers. A model that is far larger than its checkpoint is refused before it takes memory."""
        super().post_init()  # type: ignore[misc]
        # a class may excuse tensors that its old checkpoints lack; transformers then leaves them random without a warning
        self._keys_to_ignore_on_load_missing = set[str]()
        self._keys_to_ignore_on_load_unexpected = set[str]()
        most, folder = getattr(_room, "limit", None) or (None, Path())
        tensors = [*self.parameters(), *self.buffers()]  # type: ignore[attr-defined]
        if most is not None and (found := sum(tensor.numel() for tensor in tensors)) > most:
            raise CheckpointError(
                f"{named(folder / CONFIG)} describes a model with {found:,} numbers, far more than the weights beside it "
                "have; get the checkpoint again."
            )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as `PreTrainedModel.save_pretrained` does, with the weights' fingerprints and a seal."""
        config = self.config  # type: ignore[attr-defined]
        tensors = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
        # weights that are offloaded or sharded over processes cannot be hashed here
        whole = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in tensors.values())
        tied = set(getattr(self, "all_tied_weights_keys", None) or {})
        saved = {name: tensor for name, tensor in tensors.items() if name not in tied}
        config.fingerprints = fingerprint_parts(saved) if whole else None
        if self.found_as:
            config.auto_map = remote_code(save_directory, self.found_as)
        # fingerprints include the names of tensors; transformers would give those of some towers older names
        kwargs.setdefault("save_original_format", False)
        with self.apart(saved if whole else {}, save_directory) as apart:
            if apart:
                elsewhere = {part: mark for marks in apart.values() for part, mark in marks.items()}
                config.fingerprints |= elsewhere
                kwargs["state_dict"] = {name: t for name, t in saved.items() if part_of(name) not in elsewhere}
            self._card = measured_card(config)  # before transformers overwrites README.md on the way to the hub
            result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.should_save_on_this_rank(kwargs.get("is_main_process", True)):  # type: ignore[attr-defined]
            seal(save_directory, MODEL)
        return result

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing. transformers would copy omni's source files into the checkpoint; see `remote_code` instead."""

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Put the model card and the seal into a folder before transformers uploads it to the hub."""
        write_card(working_dir, self._card, self.config.model_type)  # type: ignore[attr-defined]
        seal(working_dir, MODEL)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


WHERE = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments of `from_pretrained` that say where a checkpoint is."""


def _folder_of(name: Any, place: Mapping[str, Any]) -> Path | None:
    """The folder with the files of a checkpoint; for one on the hub, its local copy. None if there is none."""
    if os.path.isdir(name):
        return Path(name) / (place.get("subfolder") or "")
    config = on_hub(name, CONFIG, place)
    return config.parent if config is not None else None


@contextmanager
def _room_for(folder: Path | None, variant: str | None, gathered: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Inside of the block, a model may not be much larger than the files in this folder, or than what was gathered."""
    if folder is not None and gathered is not None:
        held = sum(tensor.nbytes for tensor in gathered.values())
    else:
        files = [] if folder is None else [file for file in safetensors_files(folder, variant) if file.exists()]
        held = sum(file.stat().st_size for file in files)
    if folder is not None and held:  # without files, transformers says what is missing
        _room.limit = ROOM[0] * held + ROOM[1], folder
    try:
        yield
    finally:
        _room.limit = None


def _take_tower(cls: Any, folder: Any, kwargs: dict[str, Any]) -> re.Pattern[str] | None:
    """If `folder` holds a fused model with an encoder of this class, change `kwargs` so that its tower is loaded.

    Returns a pattern of the tensors that belong to other parts; None if the checkpoint is one of this class.
    """
    own_type = cls.config_class.model_type
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return None
    where = {key: kwargs[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(folder, **where)
    if not values:  # transformers would build a random model with the default settings
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
    if (place := (values.get("parts_from") or {}).get(f"{towers[0]}_tower")) is not None:
        raise CheckpointError(f"{str(folder)!r} has its {towers[0]}_tower in {place!r}; load it from there.")
    tower = re.escape(towers[0])
    kwargs["key_mapping"] = {rf"^(model\.)?{tower}_tower\.": ""}
    return re.compile(rf"(model\.)?(?!{tower}_tower\.)(\w+_tower|\w+_projector|language_model)\.|lm_head\.")


def _problems(model: Any, report: Mapping[str, Any], excused: Collection[str], others: re.Pattern[str]) -> list[str]:
    """What is wrong with the tensors of a checkpoint, one line each. `others` matches tensors of other classes."""
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
