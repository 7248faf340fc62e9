"""Pictures as a modality: the bundle, and where the tokens of a vision tower are, omni's or any of transformers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from omni.modality import Modality
from omni.vision.pictures import PictureError, picture_size, read_picture


def grid_shapes(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Rows and columns of patches in each picture of `pixel_values` [B, 3, H, W].

    Raises:
        ValueError: the tower does not end with one token for each patch.
    """
    patch = getattr(config, "patch_size", None)
    if patch is None or getattr(config, "num_detection_tokens", False):  # as in ResNet; in YOLOS
        raise ValueError(f"Expected an encoder whose last tokens are patches, found a {config.model_type}.")
    rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return [(picture.shape[-2] // rows, picture.shape[-1] // columns) for picture in inputs["pixel_values"]]


def read(encoded: Any, num_patches: int) -> dict[str, Any]:
    """`cls` float[B, 1, D] and `grid` float[B, N, D] of any vision tower.

    omni's encoder names them. In others (CLIP, SigLIP, DINOv2, ViT) the patches are the last N tokens. Before them come
    CLS and perhaps registers. For a tower without CLS, the pooled output takes its place.

    Raises:
        ValueError: the tower returns fewer tokens than patches, or a map of features instead of tokens.
    """
    if getattr(encoded, "cls", None) is not None:
        return {name: getattr(encoded, name) for name in ("cls", "grid") if getattr(encoded, name) is not None}
    hidden_states = encoded.last_hidden_state
    if hidden_states.ndim != 3:
        raise ValueError(f"The vision tower returned float{[*hidden_states.shape]}; expected tokens, float[B, N, D].")
    extra = hidden_states.shape[1] - num_patches
    if extra < 0:
        raise ValueError(f"The vision tower returned {hidden_states.shape[1]} tokens for {num_patches} patches.")
    tokens = {"grid": hidden_states[:, extra:]}
    if extra:
        tokens["cls"] = hidden_states[:, :1]
    elif getattr(encoded, "pooler_output", None) is not None:
        tokens["cls"] = encoded.pooler_output[:, None]
    return tokens


def count_pixels(data: bytes) -> int:
    """Width times height of a picture, as its file states; 0 if it states none. Reading it will then explain why."""
    try:
        width, height = picture_size(data)
    except PictureError:
        return 0
    return width * height


def stand_ins(picture: Any, seed: int) -> dict[str, Any]:
    """A grey picture of the same size, and one of noise. Neither shows anything."""
    noise = np.random.default_rng(seed).integers(0, 256, (picture.height, picture.width, 3), dtype=np.uint8)
    return {"blank": Image.new("RGB", picture.size, (128, 128, 128)), "noise": Image.fromarray(noise)}


def side_of(config: Any, preprocessor: Any) -> int:
    """Height and width of the pictures that an encoder was made for."""
    side = getattr(config, "image_size", None) or preprocessor.size["height"]
    return int(side if isinstance(side, int) else side[0])


def probes(config: Any, preprocessor: Any) -> list[Image.Image]:
    """Noise and gradients, which no encoder was trained on, of several sizes if pictures are scaled."""
    side, random = side_of(config, preprocessor), np.random.default_rng(0)
    sizes = [(side, side), (3 * side, 2 * side), (side, 2 * side)]
    if not getattr(preprocessor, "do_resize", False):
        sizes = [(side, side)] * 3
    noise = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    across, down = np.meshgrid(np.linspace(0, 255, side), np.linspace(255, 0, side))
    gradient = np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8)
    return [Image.fromarray(each) for each in (*noise, gradient)]


image = Modality(
    name="image",
    token="<image>",
    inputs=("pixel_values",),
    config_class="omni.vision.configuration_vision:OmniVisionConfig",
    model_class="omni.vision.modeling_vision:OmniVisionModel",
    preprocessor_class="omni.vision.image_processing_vision:OmniImageProcessor",
    grid_shapes=grid_shapes,
    grid_dims=2,
    read=read,
    open=read_picture,
    suffixes=(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    media_types=("image/*",),
    measure=count_pixels,
    unit="pixels",
    noun="picture",
    show=lambda picture: picture,
    stand_ins=stand_ins,
    probes=probes,
    content=lambda picture: repr(picture.size).encode() + picture.tobytes(),
)
