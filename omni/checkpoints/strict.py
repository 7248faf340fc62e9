"""Strict loading: a checkpoint is loaded whole and unchanged, or it raises and names what is wrong.

transformers' `from_pretrained` fills a missing tensor with random numbers and mentions it in a warning. For a model of
several parts that were trained apart this is the classic silent failure: an encoder or projector that is half random
still lets the language model answer fluently. Here every missing, unexpected or mis-shaped tensor is an error, unless
the caller asked for the report (`output_loading_info=True`) or named what may be missing.

A flipped bit, or the tensors of a stranger put among those that were trained together, does not pass either: a saved
configuration carries a fingerprint of each part's weights (`fingerprints.py`).
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .fingerprints import compare_fingerprints, fingerprint_parts, note_checksums, part_of, saved_and_found
from .ordinary import load_ordinary, nothing_drawn

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


class CheckpointError(ValueError):
    """A folder that cannot be used for what it is needed for; the message says which, why, and what to do."""


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
            ValueError: missing, unexpected or mis-shaped tensors, by name; weights that differ from the fingerprints
                that were saved with them.
            OSError: no such folder, no weights in it, or a file that cannot be read whole.
        """
        kwargs.setdefault("use_safetensors", True)
        mismatched_allowed = kwargs.pop("ignore_mismatched_sizes", False)
        foreign = _take_tower(cls, pretrained_model_name_or_path, kwargs)
        where = pretrained_model_name_or_path, kwargs.get("subfolder", "")
        with _LOADING, ThreadPoolExecutor(1) as beside:
            # takes as long as building the model, and another core
            hashed = beside.submit(saved_and_found, *where, kwargs.get("variant"))
            if not (model_args or output_loading_info):
                model = load_ordinary(cls, pretrained_model_name_or_path, kwargs)
                if model is not None:
                    compare_fingerprints(pretrained_model_name_or_path, *hashed.result(), ())
                    return model
            with _one_by_one(*where):
                model, report = super().from_pretrained(  # type: ignore[misc]
                    pretrained_model_name_or_path,
                    *model_args,
                    output_loading_info=True,
                    # otherwise collected in the report, so that one message names all of them
                    ignore_mismatched_sizes=mismatched_allowed or not output_loading_info,
                    **kwargs,
                )
        if foreign is not None:
            del model._weight_conversions  # it would be saved again under its names in the fused model
        if output_loading_info:
            return model, report
        if pretrained_model_name_or_path is None:  # no checkpoint: weights in `state_dict`, the rest is asked to be new
            return model
        allowed = [re.compile(pattern) for pattern in allow_missing]
        excused = {name for name in report["missing_keys"] if any(pattern.search(name) for pattern in allowed)}
        problems = [f"missing: {name}" for name in sorted(set(report["missing_keys"]) - excused)]
        others = foreign or cls.left_to_others
        problems += [f"unexpected: {name}" for name in sorted(report["unexpected_keys"]) if not others.match(name)]
        if not mismatched_allowed:
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
        if problems:
            raise ValueError(_complaint(cls.__name__, pretrained_model_name_or_path, problems))
        untrained = {part_of(name) for name in excused}
        if untrained:
            model.config.untrained = sorted({*(getattr(model.config, "untrained", None) or []), *untrained})
        compare_fingerprints(pretrained_model_name_or_path, *hashed.result(), untrained)
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as `PreTrainedModel.save_pretrained` does, with the fingerprints of the weights in the configuration."""
        config = self.config  # type: ignore[attr-defined]
        tensors = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
        # weights that are elsewhere (offloaded, sharded over processes) cannot be hashed here
        whole = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in tensors.values())
        tied = set(getattr(self, "all_tied_weights_keys", None) or {})
        saved = {name: tensor for name, tensor in tensors.items() if name not in tied}
        config.fingerprints = fingerprint_parts(saved) if whole else None
        config.checksums = None
        if self.found_as:
            config.auto_map = remote_code(save_directory, self.found_as)
        # under the names that the tensors have here, which the fingerprints are of: some towers would get older ones
        kwargs.setdefault("save_original_format", False)
        self._card = measured_card(config)  # now: on the way to the hub, transformers overwrites README.md
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if config.fingerprints and kwargs.get("is_main_process", True):
            config.checksums = note_checksums(Path(save_directory), kwargs.get("variant"))
        return result

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """Where a checkpoint's model is built before it is filled: without drawing the numbers that will be replaced."""
        return [*super().get_init_context(*args, **kwargs), nothing_drawn()]  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: transformers would copy our source files into the next checkpoint; `remote_code` does what is needed."""

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Before a folder goes to the hub, by either of transformers' ways: put the model card into it."""
        write_card(working_dir, self._card, self.config.model_type)  # type: ignore[attr-defined]
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


def _take_tower(cls: Any, folder: Any, kwargs: dict[str, Any]) -> re.Pattern[str] | None:
    """If `folder` holds a fused model with an encoder of this class, arrange that its tower is loaded.

    Returns the pattern of the checkpoint's tensors that belong to others; None for an ordinary checkpoint.
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
    encoders = {name: values[f"{name}_config"]["model_type"] for name in sections}
    towers = [name for name, model_type in encoders.items() if model_type == own_type]
    if len(towers) != 1:
        raise ValueError(
            f"{str(folder)!r} is a fused model with encoders {encoders}; exactly one of them must be {own_type!r} to be "
            f"loaded as {cls.__name__}."
        )
    kwargs["key_mapping"] = {rf"^(model\.)?{towers[0]}_tower\.": ""}
    return re.compile(rf"(model\.)?(?!{towers[0]}_tower\.)(\w+_tower|\w+_projector|language_model)\.|lm_head\.")


@contextmanager
def _one_by_one(folder: Any, subfolder: str, small: int = 256 * 2**20) -> Iterator[None]:
    """Inside, transformers reads the tensors of a small checkpoint itself, since its threads cost more than they save."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    files = [] if folder is None else list((Path(folder) / subfolder).glob("*.safetensors"))
    applies = switch not in os.environ and 0 < sum(file.stat().st_size for file in files) < small
    if applies:
        os.environ[switch] = "1"
    try:
        yield
    finally:
        if applies:
            os.environ.pop(switch, None)


def _complaint(cls: str, folder: Any, problems: list[str], shown: int = 20) -> str:
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return (
        f"The checkpoint {str(folder)!r} does not fit {cls}; tensors that are wrong: {len(problems)}.\n"
        + "\n".join(lines)
        + "\nNothing is left at random: use the checkpoint's own class and configuration, or name what may be missing "
        "with allow_missing=[...] (regular expressions); such a part then counts as untrained."
    )


# --- What a saved folder says of itself -------------------------------------------------------------------------------

REMOTE_CODE = '''"""What transformers runs of this checkpoint with trust_remote_code=True: the import of its package."""

try:
    import omni

    omni.OmniProcessor  # noqa: B018 - the package of this name on PyPI is another project's, and has none
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This checkpoint needs the package omni-thinker, which is imported as `omni` (the `omni` on PyPI is another "
        "project): pip install omni-thinker"
    ) from error


def __getattr__(name):
    return getattr(omni, name)
'''


def remote_code(folder: Any, classes: Mapping[str, str]) -> dict[str, str]:
    """Write the module that transformers imports with `trust_remote_code=True`, and return its `auto_map`.

    Args:
        folder: of a checkpoint.
        classes: for each Auto class the class of omni that it shall find.
    """
    path = Path(folder) / "omni_remote.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(REMOTE_CODE, encoding="utf-8")
    return {auto: f"{path.stem}.{name}" for auto, name in classes.items()}


MEASURED = re.compile(r"<!-- omni evaluate -->\n.*?<!-- end of omni evaluate -->\n?", re.DOTALL)
"""What `omni evaluate --card` writes into a model card; see `omni.evaluation.tables`."""


def measured_card(config: Any) -> str | None:
    """The model card of the checkpoint that a model was loaded from, if the weights are still those; else None."""
    source = Path(str(config.name_or_path or ""))
    try:
        same = json.loads((source / "config.json").read_text(encoding="utf-8"))["fingerprints"] == config.fingerprints
        return (source / "README.md").read_text(encoding="utf-8") if same and config.fingerprints else None
    except (OSError, ValueError, KeyError):
        return None


def write_card(folder: str | Path, measured: str | None, model_type: str) -> None:
    """Put a model card into a folder that goes to the hub, whose README.md is what transformers would send.

    Without a card of these very weights they have not been measured: the hub's card stays, without tables that were
    measured on others, or there is a new one that says so.
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if measured is not None:
        text = measured
    elif not text or "has been automatically generated" in text:
        text = NEW_CARD.format(tag=CARD_TAGS.get(model_type, "feature-extraction"), kind=model_type)
    else:
        text = MEASURED.sub("", text)
    path.write_text(text, encoding="utf-8")


CARD_TAGS = {"omni": "image-text-to-text", "omni_vision": "image-feature-extraction"}
NEW_CARD = """---
library_name: transformers
pipeline_tag: {tag}
---
# A model of type {kind}

It needs the package `omni-thinker` (`import omni` before `from_pretrained`, or `trust_remote_code=True`; the `omni` on
PyPI is another project).

How well it does has not been measured. Save it into a folder with this file as README.md, and
`omni evaluate FOLDER --card FOLDER/README.md` writes the scores here.
"""
