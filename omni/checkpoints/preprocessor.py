"""How the preprocessors of omni's encoders are saved and loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cards import remote_code
from .seal import PREPROCESSOR, seal, verify_files

NO_SETTINGS = frozenset({"code_revision", "dtype", "return_unused_kwargs", "torch_dtype", "trust_remote_code"})
"""Arguments that Auto classes and pipelines of transformers pass to a preprocessor although they are no settings of it."""


class SealedPreprocessorMixin:
    """Saves preprocessor_config.json with its seal, and refuses to load it if it has changed since.

    In a list of base classes it comes before transformers' class.

    Attributes:
        found_as: for each Auto class, the class of omni that it returns; see `remote_code`.
    """

    found_as: Mapping[str, str] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load from a folder or hub name.

        Raises:
            CheckpointError: a file has changed since it was sealed.
        """
        verify_files(pretrained_model_name_or_path, PREPROCESSOR, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write preprocessor_config.json and its seal, and what `trust_remote_code=True` needs."""
        self.auto_map = remote_code(save_directory, self.found_as)
        saved = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        seal(save_directory, PREPROCESSOR)
        if push_to_hub:  # after the seal, so that it is uploaded too
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)  # type: ignore[attr-defined]
        return saved

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing; see `StrictLoadingMixin.register_for_auto_class`."""
