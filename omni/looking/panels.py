"""Draw attention: the weights of `attention` as colours over the items, which `Modality.show` makes visible.

draw_encoder(encoder_attention(encoder, item), encoder, item)    a sheet of heads, their mean, and rollout
draw_words(word_attention(...), processor, items)                a sheet of words, one line for each item
overlay(picture, weights)                                        one map over one picture, or under one of a time
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from omni.fusion.processing_omni import OmniProcessor
from omni.items import can_be_shown, read_items
from omni.loading.encoder import Encoder
from omni.looking.attention import EncoderAttention, Floats, WordAttention, places_of
from omni.modality import Modality
from omni.registry import get_modality

MAGMA = np.array(
    [(0, 0, 4), (20, 14, 54), (59, 15, 112), (100, 26, 128), (140, 41, 129), (183, 55, 121), (222, 73, 104),
     (247, 112, 92), (254, 159, 109), (254, 207, 146), (252, 253, 191)], dtype=np.float32
)  # fmt: skip
"""The colour map magma of matplotlib (van der Walt and Smith, CC0) in steps of a tenth. Equal steps look equally large."""

PANEL = 224
"""Width of a panel in pixels."""
GAP, LINE = 16, 20


@dataclass(frozen=True)
class _Panel:
    picture: Image.Image
    title: str
    weights: Floats | None = None


def overlay(picture: Image.Image, weights: Floats) -> Image.Image:
    """Draw weights as colours. Black is 0, the brightest colour the largest weight.

    Each place has one colour, because there are no weights between places.

    Args:
        picture: what is seen of an item.
        weights: float[h, w], drawn over the picture in grey; or float[N] for N stretches of time from the left to the
            right, drawn as a band under the picture, which is made lower for it.
    """
    share = weights / weights.max() if weights.any() else weights
    if share.ndim == 1:
        high = picture.height // 8
        drawn = picture.convert("RGB").resize((picture.width, picture.height - high), Image.Resampling.LANCZOS)
        band = Image.fromarray(_colours(share)[None].astype(np.uint8))
        sheet = Image.new("RGB", picture.size)
        sheet.paste(drawn)
        sheet.paste(band.resize((picture.width, high), Image.Resampling.NEAREST), (0, drawn.height))
        return sheet
    strength = Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.NEAREST)
    strengths = np.asarray(strength)[..., None]
    # contrast is stretched, so that a colour looks the same over a dark and over a light picture
    full = ImageOps.autocontrast(picture.convert("L"), cutoff=1)
    grey = 0.7 * np.asarray(full, dtype=np.float32)[..., None]
    opacity = 0.45 + 0.25 * strengths  # small weights show more of the picture
    return Image.fromarray((opacity * _colours(strengths[..., 0]) + (1 - opacity) * grey).astype(np.uint8))


def _colours(strengths: Floats) -> Floats:
    """[...] from 0 to 1 -> [..., 3]"""
    steps = np.linspace(0, 1, len(MAGMA))
    return np.stack([np.interp(strengths, steps, channel) for channel in MAGMA.T], axis=-1)


def draw_encoder(attention: EncoderAttention, encoder: Encoder, item: Any) -> Image.Image:
    """One line of panels: the item, each head, the mean of the heads, and rollout."""
    bundle = encoder.bundle
    seen = _seen(bundle, encoder.preprocessor, item)
    heads = [_Panel(seen, f"head {number}", weights) for number, weights in enumerate(attention.heads, 1)]
    combined = [_Panel(seen, "mean of heads", attention.mean), _Panel(seen, "rollout", attention.rollout)]
    over = places_of(attention.rollout.shape)
    title = f"layer {attention.layer} of {attention.layers}, {attention.query} over the {over}"
    return _sheet(title, [[_Panel(seen, bundle.noun), *heads, *combined]])


def draw_words(attention: WordAttention, processor: OmniProcessor, items: Sequence[Any]) -> Image.Image:
    """One line of panels for each item that can be shown: the item, and its map for each word of the answer.

    Args:
        attention: as `word_attention` returns it.
        processor, items: see `word_attention`.
    """
    items = read_items(items)
    count, number = Counter(item.modality for item in items), Counter[str]()
    rows = []
    for item, maps in zip(items, attention.maps, strict=True):
        number[item.modality] += 1
        if not can_be_shown(item):
            continue
        bundle = get_modality(item.modality)
        title = f"{bundle.noun} {number[item.modality]}" if count[item.modality] > 1 else bundle.noun
        seen = _seen(bundle, processor.preprocessors[item.modality], item.value)
        words = zip(attention.words, maps, strict=True) if maps.size else ()  # none if the Thinker gets CLS alone
        panels = [_Panel(seen, f"{place}. {word}", weights) for place, (word, weights) in enumerate(words, 1)]
        rows.append([_Panel(seen, title), *panels])
    return _sheet(attention.answer.question, rows)


def _seen(bundle: Modality, preprocessor: Any, item: Any) -> Image.Image:
    assert bundle.show is not None
    return as_seen(preprocessor if bundle.grid_dims == 2 else None, bundle.show(item))


def as_seen(preprocessor: Any, picture: Image.Image, width: int = PANEL) -> Image.Image:
    """The part of a picture that its grid covers, `width` pixels wide. Some image processors crop or pad the picture."""
    if any(getattr(preprocessor, name, False) for name in ("do_center_crop", "do_pad")):
        pixels = preprocessor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    aspect = min(max(picture.height / picture.width, 0.25), 2)  # a strip must not fill the sheet
    return picture.resize((width, round(width * aspect)), Image.Resampling.LANCZOS)


def _sheet(title: str, groups: Sequence[Sequence[_Panel]], columns: int = 6) -> Image.Image:
    """Panels in lines of `columns`. Each group begins a new line. The scale of the colours is at the bottom."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    rows = [group[start : start + columns] for group in groups for start in range(0, len(group), columns)]
    heights = [row[0].picture.height for row in rows]  # the panels of a line show one item
    width = GAP + max(2, *map(len, rows)) * (PANEL + GAP)
    lines = textwrap.wrap(title, (width - 2 * GAP) // 8)
    height = (len(lines) + 2) * LINE + 3 * GAP + sum(2 * LINE + GAP + each for each in heights)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), "\n".join(lines), "black", font, spacing=LINE - 15)
    top = 2 * GAP + len(lines) * LINE
    for row, high in zip(rows, heights, strict=True):
        for number, panel in enumerate(row):
            left = GAP + number * (PANEL + GAP)
            pen.text((left, top), _shortened(panel.title, font), "black", font)
            picture = panel.picture
            if panel.weights is not None:
                picture = overlay(picture, panel.weights)
                note = f"{panel.weights.sum():.0%} on {places_of(panel.weights.shape)}, up to {panel.weights.max():.1%}"
                pen.text((left, top + LINE + high + 4), note, "dimgrey", small)
            sheet.paste(picture, (left, top + LINE))
        top += 2 * LINE + GAP + high
    strip = _colours(np.linspace(0, 1, PANEL, dtype=np.float32))[None].repeat(10, axis=0)
    sheet.paste(Image.fromarray(strip.astype(np.uint8)), (GAP, top))
    pen.text((GAP, top + 14), "0", "dimgrey", small)
    pen.text((GAP + PANEL, top + 14), "largest of the panel", "dimgrey", small, anchor="ra")
    return sheet


def _shortened(text: str, font: Any) -> str:
    """A title, cut to the width of a panel."""
    if font.getlength(text) <= PANEL:
        return text
    while font.getlength(f"{text}...") > PANEL:
        text = text[:-1]
    return f"{text}..."
