"""Pictures to tensors: RGB, resized to the encoder's square (bilinear with antialiasing, aspect not kept), normalised.

This needs PIL and numpy, not torchvision. `read_picture` makes RGB of every file and every picture of PIL.
"""

import base64
import binascii
import os
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, ImageInput, PILImageResampling

from omni.checkpoints.preprocessor import NO_SETTINGS, SealedPreprocessorMixin
from omni.files import ReadError
from omni.vision.formats import plugin_of
from omni.vision.pictures import MAX_BYTES, read_picture, said_of_picture

SAVED_BESIDE = frozenset({"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"})
"""Keys that transformers writes into the file of an image processor beside the settings."""


class OmniImageProcessor(SealedPreprocessorMixin, PilBackend):
    """Makes `pixel_values` float[B, 3, H, W] from pictures of any size: `(pixel / 255 - mean) / std`.

    micro-Omni's encoder takes values in [0, 1]: `OmniImageProcessor(do_normalize=False)`.

    Raises:
        TypeError: a setting is unknown.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    found_as = {"AutoImageProcessor": "OmniImageProcessor"}

    def __init__(self, **settings: Any) -> None:
        self._refuse_unknown(settings.keys() - SAVED_BESIDE)
        super().__init__(**settings)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but an unknown setting is refused unless `return_unused_kwargs` asks for it."""
        if not kwargs.get("return_unused_kwargs"):
            cls._refuse_unknown(kwargs.keys() - NO_SETTINGS)
        return super().from_dict(image_processor_dict, **kwargs)

    def __call__(self, images: ImageInput, *args: Any, **settings: Any) -> BatchFeature:
        """Make `pixel_values` float[B, 3, H, W].

        Args:
            images: a picture or several: PIL images, arrays with values from 0 to 255, or what `fetch_images` takes.
            settings: settings for this call instead of the processor's own; `return_tensors` is "pt" or "np".

        Raises:
            PictureError: a picture cannot be read.
            ValueError: an array has values from 0 to 1, which `do_rescale` would divide by 255 a second time.
            TypeError: a setting is unknown.
        """
        self._refuse_unknown(settings.keys())
        return super().__call__(images, *args, **settings)

    def fetch_images(self, images: Any) -> Any:
        """Read files: a path, the bytes of a file, an http address, a data URI or base64; or a list of these.

        Raises:
            PictureError: a picture cannot be read.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(each) for each in images]
        if isinstance(images, str | bytes | os.PathLike):
            return read_picture(_source(images) if isinstance(images, str) else images)
        return super().fetch_images(images)

    def convert_to_rgb(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """A picture of PIL as uint8[H, W, 3]; an array as transformers converts it."""
        if isinstance(image, Image.Image):
            return np.asarray(read_picture(image))
        converted: np.ndarray = super().convert_to_rgb(image, *args, **kwargs)
        return converted

    def process_image(self, image: ImageInput, *args: Any, **settings: Any) -> np.ndarray:
        """One picture as an array [C, H, W], with its own values. Transparent parts become white."""
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 4:
            image = Image.fromarray(image)  # not needed from transformers 5.21 on, as the next conversion
        if settings.get("do_convert_rgb") and isinstance(image, Image.Image) and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        array = super().process_image(image, *args, **settings)
        if settings.get("do_rescale") and array.dtype.kind in "bf" and array.any() and not array.max() > 1:
            raise ValueError(
                f"Expected a picture with values from 0 to 255, found an array of {array.dtype} from {array.min():g} to "
                f"{array.max():g}, which would be divided by 255 once more; pass do_rescale=False, or bytes (uint8)."
            )
        return array

    def resize(self, image: np.ndarray, size: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """uint8[C, h, w] -> uint8[C, H, W]. A picture of that size stays as it is."""
        if image.dtype == np.uint8 and image.shape[-2:] == (size.height, size.width):
            return image
        resized: np.ndarray = super().resize(image, size, *args, **kwargs)
        return resized

    @classmethod
    def _refuse_unknown(cls, settings: Collection[str]) -> None:
        known = cls.valid_kwargs.__annotations__.keys()
        if unknown := sorted(set(settings) - known):
            raise TypeError(
                f"{cls.__name__} knows no {', '.join(map(repr, unknown))}; its settings are {', '.join(known)}."
            )


def _source(text: str) -> str | bytes:
    """The file that a string names or holds."""
    from omni.downloads import content_of  # most pictures are files

    try:
        found = content_of(text, MAX_BYTES)
    except ReadError as error:
        raise said_of_picture(error) from error
    if found is not None:
        return found
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return text
    return text if plugin_of(content) is None or os.path.exists(text) else content
