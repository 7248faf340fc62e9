"""The tensor of transformers for each tensor of micro-Omni.

micro-Omni's encoder is omni's own (`OmniVisionModel`). Its Thinker is a Llama: pre-norm blocks with RMSNorm, rotary
positions over two halves, grouped queries, a SwiGLU MLP, no biases. So a table of names is enough, and no value changes:
one of their tensors is one of omni's, or several of omni's stacked by rows (`attn.qkv`).
"""

from collections.abc import Mapping, Sequence

import torch

from omni.exchange.micro_omni.files import ConversionError, Tensors, listed

Names = dict[str, tuple[str, ...]]
"""The name of one of their tensors -> the names of our tensors that are stacked in it."""
Shapes = Mapping[str, Sequence[int]]

VISION = {
    "cls": "embeddings.cls_token",
    "pos": "embeddings.position_embeddings",
    "proj.weight": "embeddings.patch_embeddings.weight",
    "proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
}
VISION_BLOCK = {
    "self_attn.in_proj_weight": "attention.qkv.weight",
    "self_attn.in_proj_bias": "attention.qkv.bias",
    "self_attn.out_proj.weight": "attention.o_proj.weight",
    "self_attn.out_proj.bias": "attention.o_proj.bias",
    **{f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias") for theirs, ours in (
        ("linear1", "mlp.fc1"), ("linear2", "mlp.fc2"), ("norm1", "norm1"), ("norm2", "norm2"),
    )},
}  # fmt: skip
AUDIO = {
    **{f"{theirs}.{kind}": f"embeddings.stem.{ours}.{kind}" for kind in ("weight", "bias") for theirs, ours in (
        ("net.0", "convolutions.0"), ("net.2", "convolutions.1"), ("1", "convolutions.2"), ("proj", "projection"),
    )},
    "norm.weight": "norm.weight",
}  # fmt: skip
AUDIO_BLOCK = {
    **{f"{theirs}{kind}": f"{ours}.{kind}" for kind in ("weight", "bias") for theirs, ours in (
        ("qkv_proj.", "attention.qkv"), ("out_proj.", "attention.o_proj"), ("mlp.0.", "mlp.fc1"), ("mlp.2.", "mlp.fc2"),
    )},
    "norm1.weight": "norm1.weight",
    "norm2.weight": "norm2.weight",
}  # fmt: skip
OLDER_ATTENTION = {"qkv_proj.": "attn.in_proj_", "out_proj.": "attn.out_proj."}
"""The names of the audio encoder's attention in files from before November 2025."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
THINKER = {"tok_emb.weight": EMBEDDING, "norm.weight": "model.norm.weight", "lm_head.weight": HEAD}
THINKER_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    **{f"mlp.{name}.weight": f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}
QUERY_KEY_VALUE = {f"attn.{name}.weight": f"self_attn.{name}_proj.weight" for name in ("q", "k", "v")}
PROJECTOR: Names = {name: (f"linear.{name}",) for name in ("weight", "bias")}


def vision_names(layers: int) -> Names:
    """The names of an encoder with `layers` blocks."""
    return _names(VISION, VISION_BLOCK, "layers", layers)


def audio_names(layers: int, reduction: int, older: bool) -> Names:
    """The names of an audio encoder with `layers` blocks that shortens time 8 or 4 times. `older`: see `OLDER_ATTENTION`."""
    whole = {}
    for theirs, ours in AUDIO.items():
        if theirs.startswith("net."):
            theirs = f"down.0.{theirs}" if reduction == 8 else f"down.{theirs}"
        elif theirs.startswith("1."):
            theirs = f"down.{theirs}"
        if reduction == 8 or not theirs.startswith("down.1."):
            whole[theirs] = ours
    block = dict(AUDIO_BLOCK)
    for new, old in OLDER_ATTENTION.items() if older else ():
        block = {name.replace(new, old): ours for name, ours in block.items()}
    return _names(whole, block, "layers", layers)


def thinker_names(layers: int, joined: bool) -> Names:
    """The names of a Thinker with `layers` blocks. `joined`: queries, keys and values are one matrix, `attn.qkv`."""
    block: dict[str, str | tuple[str, ...]] = dict(THINKER_BLOCK)
    block |= {"attn.qkv.weight": tuple(QUERY_KEY_VALUE.values())} if joined else QUERY_KEY_VALUE
    return _names(THINKER, block, "model.layers", layers)


def _names(whole: Mapping[str, str], block: Mapping[str, str | tuple[str, ...]], prefix: str, layers: int) -> Names:
    names: Names = {theirs: (ours,) for theirs, ours in whole.items()}
    for i in range(layers):
        for theirs, ours in block.items():
            several = (ours,) if isinstance(ours, str) else ours
            names[f"blocks.{i}.{theirs}"] = tuple(f"{prefix}.{i}.{name}" for name in several)
    return names


# --- Renaming ---------------------------------------------------------------------------------------------------------


def to_ours(part: str, names: Names, shapes: Shapes, tensors: Tensors) -> Tensors:
    """Rename their tensors of a part to our names, and split those that hold several of ours.

    Args:
        part: the name of the part in messages.
        names: which tensor is which.
        shapes: the shapes of our tensors.
        tensors: their tensors.

    Raises:
        ConversionError: a tensor is missing, unknown, or of another shape or type; the message names it.
    """
    wanted = {name: _joined([shapes[each] for each in ours]) for name, ours in names.items()}
    check(part, wanted, tensors)
    renamed: Tensors = {}
    for name, ours in names.items():
        pieces = torch.split(tensors[name], [shapes[each][0] for each in ours]) if len(ours) > 1 else [tensors[name]]
        renamed |= {each: piece.contiguous() for each, piece in zip(ours, pieces, strict=True)}
    return renamed


def to_theirs(names: Names, tensors: Tensors) -> Tensors:
    """Rename our tensors to their names, and stack those that are one tensor of theirs."""
    return {
        name: torch.cat([tensors[each] for each in ours]) if len(ours) > 1 else tensors[ours[0]]
        for name, ours in names.items()
    }


def _joined(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of tensors that are stacked by rows."""
    return tuple(shapes[0]) if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def check(part: str, wanted: Shapes, tensors: Tensors) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or type, and name them."""
    problems = [f"missing: {name}" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"without a place: {name}" for name in sorted(set(tensors) - set(wanted))]
    for name in sorted(set(wanted) & set(tensors)):
        if tuple(tensors[name].shape) != tuple(wanted[name]):
            problems.append(f"{name} is {tuple(tensors[name].shape)} instead of {tuple(wanted[name])}")
    types = {str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items() if name in wanted}
    if len(types) > 1 or not all(tensor.is_floating_point() for tensor in tensors.values()):
        problems.append(f"types {', '.join(sorted(types))} instead of one floating type")
    if problems:
        raise ConversionError(f"The tensors of the {part} do not fit, so nothing was written: {listed(problems)}.")
