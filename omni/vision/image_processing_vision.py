"""Pictures to tensors: RGB, squashed to the encoder's square (aspect not kept), bilinear with antialiasing, scaled.

PIL and numpy only; torchvision is not needed.
"""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling


class OmniImageProcessor(PilBackend):
    """Makes `pixel_values` float[B, 3, H, W] from pictures of any size: `(pixel / 255 - mean) / std`.

    The seed's system feeds plain [0, 1] values: `OmniImageProcessor(do_normalize=False)`.
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
