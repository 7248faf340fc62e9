"""The tensor of transformers for each tensor of micro-Omni, and the configurations that follow from the tensors.

micro-Omni's encoder is omni's own (`OmniVisionModel`). Its Thinker is a Llama: pre-norm blocks with RMSNorm, rotary
positions over two halves, grouped queries, a SwiGLU MLP, no biases. So a table of names is enough, and no value changes:
one of their tensors is one of omni's, or several of omni's stacked by rows (`attn.qkv`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaConfig

from omni.exchange.micro_omni.files import Config, ConversionError, Tensors, listed

Names = dict[str, tuple[str, ...]]
"""The name of one of their tensors -> the names of our tensors that are stacked in it."""
Shapes = Mapping[str, Sequence[int]]

HEAD_WIDTH = 64
"""Width of a head in every configuration of micro-Omni. The tensors do not show it."""

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

K = "blocks.0.attn.k.weight"

OTHER_THINKERS = ("use_moe", "use_spiking", "use_ltc", "window_size", "rope_scaling", "rope_scaling_factor")
"""Settings of micro-Omni. If one of them is on, its Thinker is not a Llama."""
THEIR_AUDIO = {"stem": "conv2d", "block_norm": "rms_norm", "position_embedding": "none", "cls_token": False}
"""The settings with which an `OmniAudioModel` is the audio encoder of micro-Omni."""
NORM_EPS = 1e-5
"""The epsilon of all of micro-Omni's norms."""


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


# --- Configurations ---------------------------------------------------------------------------------------------------


def vision_settings(tensors: Tensors, config: Config, notes: list[str]) -> dict[str, Any]:
    """The settings of `OmniVisionConfig` for their encoder.

    Args:
        tensors: the encoder's tensors.
        config: the encoder's section of micro-Omni's configuration; may be empty.
        notes: a list that gets a note for each assumption.

    Raises:
        ConversionError: the tensors are not an encoder's, or the configuration is another encoder's.
    """
    width, channels, patch, _ = _shape("vision encoder", tensors, "proj.weight", 4)
    _, tokens, _ = _shape("vision encoder", tensors, "pos", 3)
    hidden, _ = _shape("vision encoder", tensors, "blocks.0.linear1.weight", 2)
    grid = math.isqrt(tokens - 1)
    if grid**2 != tokens - 1:
        raise ConversionError(
            f"The encoder has {tokens} positions; expected one for CLS and one for each patch of a square grid, so convert "
            "a file that micro-Omni wrote."
        )
    measured = {
        "img_size": grid * patch,
        "patch": patch,
        "d_model": width,
        "n_layers": _blocks(tensors),
        "d_ff": hidden,
    }
    _compare("vision encoder", measured, config)
    return {
        **measured,
        "num_channels": channels,
        "n_heads": _heads("vision encoder", width, config, notes),
        "dropout": config.get("dropout", 0.1),
    }


def audio_settings(tensors: Tensors, config: Config, notes: list[str]) -> dict[str, Any]:
    """The settings of `OmniAudioConfig` for an audio encoder of micro-Omni.

    Args:
        tensors: the encoder's tensors.
        config: the encoder's section of micro-Omni's configuration; empty if there is none.
        notes: gets a note for each assumption.

    Raises:
        ConversionError: the tensors are no audio encoder's, or the configuration is another encoder's.
    """
    reduction = 8 if "down.1.weight" in tensors else 4
    width, inputs = _shape("audio encoder", tensors, "proj.weight", 2)
    hidden, _ = _shape("audio encoder", tensors, "blocks.0.mlp.0.weight", 2)
    channels, *_ = _shape("audio encoder", tensors, "down.0.net.0.weight" if reduction == 8 else "down.net.0.weight", 4)
    measured = {
        "mel_bins": inputs // channels * reduction,
        "downsample_time": reduction,
        "d_model": width,
        "n_layers": _blocks(tensors),
        "d_ff": hidden,
    }
    _compare("audio encoder", measured, config)
    return {
        **measured,
        **THEIR_AUDIO,
        "stem_channels": channels,
        "n_heads": _heads("audio encoder", width, config, notes),
        "dropout": config.get("dropout", 0.1),
    }


def thinker_config(tensors: Tensors, config: Config, rotary: Sequence[torch.Tensor], notes: list[str]) -> LlamaConfig:
    """The configuration of their Thinker as a Llama.

    Args:
        tensors: the Thinker's tensors, without buffers.
        config: the Thinker's section of micro-Omni's configuration; may be empty.
        rotary: the rotary frequencies that its file holds, one tensor for each block, or none.
        notes: a list that gets a note for each assumption.

    Raises:
        ConversionError: the tensors are not a Thinker's, the Thinker is no Llama, or the configuration is another
            Thinker's.
    """
    vocab, width = _shape("Thinker", tensors, "tok_emb.weight", 2)
    other = [name for name in OTHER_THINKERS if config.get(name)]
    if other or config.get("use_swiglu") is False or "blocks.0.mlp.gate_proj.weight" not in tensors:
        raise ConversionError(
            f"The Thinker has {', '.join(other) or 'no SwiGLU MLP (mlp.gate_proj)'}; expected plain causal attention and a "
            "SwiGLU MLP in every block, as only a Llama can be converted."
        )
    hidden, _ = _shape("Thinker", tensors, "blocks.0.mlp.gate_proj.weight", 2)
    measured = {"vocab_size": vocab, "d_model": width, "n_layers": _blocks(tensors), "d_ff": hidden}
    _compare("Thinker", measured, config)
    if rotary and "n_heads" not in config:
        config = {**config, "n_heads": width // (2 * len(rotary[0]))}
    heads = _heads("Thinker", width, config, notes)
    head, theta = width // heads, float(config.get("rope_theta", 10000.0))
    frequencies = theta ** -(torch.arange(0, head, 2) / head)
    if any(each.shape != frequencies.shape or not torch.allclose(each.float(), frequencies) for each in rotary):
        raise ConversionError(
            f"The rotary frequencies (inv_freq) of the Thinker are not those of its configuration, {heads} heads of width "
            f"{head} and rope_theta {theta:g}; convert it together with the configuration that it was trained with."
        )
    if "ctx_len" not in config:
        notes.append("ctx_len of the Thinker is taken to be 512, as in micro-Omni's configurations")
    groups = heads if "blocks.0.attn.qkv.weight" in tensors else _shape("Thinker", tensors, K, 2)[0] // head
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=measured["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
        max_position_embeddings=config.get("ctx_len", 512),
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def their_vision_config(config: Any) -> dict[str, Any]:
    """micro-Omni's settings for an `OmniVisionConfig`.

    Raises:
        ConversionError: micro-Omni cannot build this encoder.
    """
    _refuse_others("vision encoder", {
        "hidden_act": (config.hidden_act, "gelu"),
        "layer_norm_eps": (config.layer_norm_eps, NORM_EPS),
        "rms_norm_eps": (config.rms_norm_eps, NORM_EPS),
        "num_channels": (config.num_channels, 3),
    })  # fmt: skip
    return {theirs: getattr(config, ours) for theirs, ours in config.attribute_map.items()}


def their_audio_config(config: Any) -> dict[str, Any]:
    """micro-Omni's settings for an `OmniAudioConfig`.

    Raises:
        ConversionError: micro-Omni cannot compute this encoder.
    """
    fixed = {**THEIR_AUDIO, "stem_channels": 64, "num_mel_bins": 128, "hidden_act": "gelu"}
    fixed |= {"layer_norm_eps": NORM_EPS, "rms_norm_eps": NORM_EPS}
    fixed["time_reduction"] = 4 if config.time_reduction == 4 else 8
    _refuse_others("audio encoder", {name: (getattr(config, name), value) for name, value in fixed.items()})
    return {theirs: getattr(config, ours) for theirs, ours in config.attribute_map.items()}


def their_thinker_config(config: Any, vocab: int) -> dict[str, Any]:
    """micro-Omni's settings for a `LlamaConfig`.

    Raises:
        ConversionError: micro-Omni cannot build this language model.
    """
    if config.model_type != "llama":
        raise ConversionError(
            f"The Thinker is of type {config.model_type!r}; expected 'llama', the only one that micro-Omni can build."
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rope = config.rope_parameters
    _refuse_others("Thinker", {
        "rms_norm_eps": (config.rms_norm_eps, NORM_EPS),
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "head_dim": (config.head_dim, config.hidden_size // heads),
        "num_key_value_heads": (groups, heads if groups == heads else max(1, heads // 2)),
    })  # fmt: skip
    return {
        "vocab_size": vocab,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": heads,
        "d_ff": config.intermediate_size,
        "rope_theta": rope["rope_theta"],
        "ctx_len": config.max_position_embeddings,
        "use_gqa": groups != heads,
        "use_swiglu": True,
        "use_moe": False,
    }


def _refuse_others(part: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    if other := [
        f"{name} {found!r} instead of {fixed!r}" for name, (found, fixed) in settings.items() if found != fixed
    ]:
        raise ConversionError(f"micro-Omni cannot build this {part}: it has {', '.join(other)}.")


def _shape(part: str, tensors: Tensors, name: str, dimensions: int) -> Sequence[int]:
    if name not in tensors or tensors[name].ndim != dimensions:
        found = (
            f"it has the shape {tuple(tensors[name].shape)}" if name in tensors else f"found {listed(sorted(tensors))}"
        )
        raise ConversionError(
            f"The {part} needs a tensor {name!r} of {dimensions} dimensions, but {found}; convert a file that micro-Omni "
            "wrote."
        )
    return tensors[name].shape


def _blocks(tensors: Tensors) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name))


def _compare(part: str, measured: Mapping[str, int], config: Config) -> None:
    """Refuse a configuration that contradicts the sizes of the tensors."""
    apart = [f"{name} {config[name]} ({value})" for name, value in measured.items() if config.get(name, value) != value]
    if apart:
        raise ConversionError(
            f"The configuration of the {part} contradicts its tensors (their values in brackets): {', '.join(apart)}; "
            "convert it together with the configuration that it was trained with."
        )


def _heads(part: str, width: int, config: Config, notes: list[str]) -> int:
    """The number of attention heads, from the configuration. The tensors do not show it."""
    heads = config.get("n_heads")
    if heads is None:
        if width % HEAD_WIDTH:
            raise ConversionError(
                f"The tensors of the {part}, of width {width}, do not tell how many heads it has, and no configuration was "
                "found; name the JSON file with its n_heads, too."
            )
        heads = width // HEAD_WIDTH
        notes.append(
            f"n_heads of the {part} is taken to be {heads}, so that heads are {HEAD_WIDTH} wide as in micro-Omni's "
            "configurations"
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConversionError(
            f"The configuration has n_heads {heads!r} for the {part}; expected a number that divides its width {width}."
        )
    return heads
