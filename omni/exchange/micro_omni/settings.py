"""The configurations that follow from micro-Omni's tensors and settings, and micro-Omni's settings for a configuration.

Tensors show most sizes. A configuration that contradicts them is refused.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaConfig

from omni.exchange.micro_omni.files import Config, ConversionError, Tensors, listed

HEAD_WIDTH = 64
"""Width of a head in every configuration of micro-Omni. The tensors do not show it."""

OTHER_THINKERS = ("use_moe", "use_spiking", "use_ltc", "window_size", "rope_scaling", "rope_scaling_factor")
"""Settings of micro-Omni. If one of them is on, its Thinker is not a Llama."""
THEIR_AUDIO = {"stem": "conv2d", "block_norm": "rms_norm", "position_embedding": "none", "cls_token": False}
"""The settings with which an `OmniAudioModel` is the audio encoder of micro-Omni."""
NORM_EPS = 1e-5
"""The epsilon of all of micro-Omni's norms."""


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
    joined = "blocks.0.attn.qkv.weight" in tensors
    groups = heads if joined else _shape("Thinker", tensors, "blocks.0.attn.k.weight", 2)[0] // head
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
