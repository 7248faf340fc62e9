"""The peers: encoders and models of the same shape as omni's, with the same weights, each written as well as it can be.

    seed     the encoder of the seed document, from the parts of `torch.nn`. In eval mode and without gradients its blocks
             use PyTorch's fused kernel, which makes it a strong peer. It computes the same as omni's encoder
    vit      transformers' ViTModel with sdpa; its final norm is a LayerNorm and not an RMSNorm
    timm     timm's VisionTransformer; so is its final norm
    onnxruntime, OpenVINO    omni's encoder, exported by `omni export`, in a runtime for deployment
    llava    transformers' LlavaForConditionalGeneration: pictures and words to words

Shapes: B pictures, N patches, D width. Every encoder maps pixels float[B, 3, H, W] to tokens float[B, 1+N, D], see
`tokens`. Each is measured eager and compiled.
"""

import atexit
import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig, ViTModel

from benchmarks.machine import CPU, ROOT
from benchmarks.measure import Unavailable
from omni.fusion.configuration_omni import OmniConfig
from omni.vision.configuration_vision import OmniVisionConfig
from omni.vision.modeling_vision import OmniVisionModel

CHECKPOINTS = ROOT / "checkpoints"


def omni(dtype: torch.dtype = torch.float32, device: torch.device = CPU, **options: Any) -> OmniVisionModel:
    """The shipped encoder. The peers have its weights."""
    model: OmniVisionModel = OmniVisionModel.from_pretrained(CHECKPOINTS / "vision_tiny", dtype=dtype, **options)
    return model.to(device)


def tokens(output: Any) -> torch.Tensor:
    """The tokens float[B, 1+N, D] in an encoder's output, which is a tensor or has a field for them."""
    found: torch.Tensor = getattr(output, "last_hidden_state", output)
    return found


# --- Encoders ---------------------------------------------------------------------------------------------------------


class SeedEncoder(nn.Module):
    """Convolution, CLS, positions, `nn.TransformerEncoder`, RMSNorm; dropout as in omni's encoder."""

    def __init__(self, config: OmniVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patches = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.num_patches, width))
        layer = nn.TransformerEncoderLayer(
            width,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float[B, 3, H, W] -> float[B, 1+N, D]."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        embedded = torch.cat([self.cls.expand(len(pixels), -1, -1), patches], dim=1) + self.positions
        encoded: torch.Tensor = self.norm(self.blocks(embedded))
        return encoded


BLOCKS = {
    "layers.": "blocks.layers.",
    "attention.qkv.": "self_attn.in_proj_",
    "attention.o_proj.": "self_attn.out_proj.",
    "mlp.fc1.": "linear1.",
    "mlp.fc2.": "linear2.",
}
"""What omni's blocks are called in `nn.TransformerEncoder`."""


def seed(model: OmniVisionModel) -> nn.Module:
    """The encoder of the seed document with the weights of `model`. It computes the same function."""
    names = {
        "embeddings.patch_embeddings.": "patches.",
        "embeddings.cls_token": "cls",
        "embeddings.position_embeddings": "positions",
    }
    return carry(model, SeedEncoder(model.config), names | BLOCKS)


def vit(model: OmniVisionModel) -> nn.Module:
    """transformers' ViTModel with the weights of `model`, up to the final norm."""
    config = model.config
    peer = ViTModel(
        ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.hidden_dropout_prob,
            layer_norm_eps=config.layer_norm_eps,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    )
    names = {"patch_embeddings.": "patch_embeddings.projection.", "norm1.": "layernorm_before."}
    names |= {"norm2.": "layernorm_after.", "norm.weight": "layernorm.weight"}
    weights = model.state_dict()
    for name in [name for name in weights if "attention.qkv." in name]:
        for part, piece in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace("qkv", f"{part}_proj")] = piece
    return carry(model, peer, names, weights)


def timm(model: OmniVisionModel) -> nn.Module:
    """timm's VisionTransformer with the weights of `model`, up to the final norm."""
    if find_spec("timm") is None:
        raise Unavailable("timm is not installed; pip install --no-deps timm is enough.")
    with _torchvision():
        transformer = import_module("timm.models.vision_transformer").VisionTransformer
    config = model.config
    peer = transformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        proj_drop_rate=config.hidden_dropout_prob,
        attn_drop_rate=config.hidden_dropout_prob,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        num_classes=0,
        global_pool="",
    )
    names = {
        "embeddings.patch_embeddings.": "patch_embed.proj.",
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "layers.": "blocks.",
        "attention.qkv.": "attn.qkv.",
        "attention.o_proj.": "attn.proj.",
    }
    return carry(model, peer, names)


ENCODERS: dict[str, Callable[[OmniVisionModel], nn.Module]] = {
    "nn.TransformerEncoder": seed,
    "transformers ViT": vit,
    "timm": timm,
}


def carry(
    model: nn.Module, peer: nn.Module, names: dict[str, str], weights: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """Give a peer omni's weights under its names, and the same mode, dtype and device. Its final norm may have a bias."""
    renamed = {}
    for name, value in (weights or model.state_dict()).items():
        for ours, theirs in names.items():
            name = theirs if name == ours else name.replace(ours, theirs) if ours.endswith(".") else name
        renamed[name] = value
    lacking, extra = peer.load_state_dict(renamed, strict=False)
    assert not extra, extra
    assert {*lacking} <= {"norm.bias", "layernorm.bias"}, lacking
    weight = next(model.parameters())
    return peer.to(weight.device, weight.dtype).train(model.training)


@contextmanager
def _torchvision() -> Iterator[None]:
    """Make `import torchvision` work. timm imports names of it that its VisionTransformer does not use.

    If torchvision is missing, names that do nothing take its place. They are removed afterwards, because other packages ask
    whether it is installed.
    """
    if find_spec("torchvision") is not None:
        yield
        return
    finder = _StandIn()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


class _Name(type):
    """A class with every attribute; each is such a class again."""

    def __getattr__(cls, name: str) -> "_Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _StandIn(MetaPathFinder, Loader):
    """An importer that finds every module of torchvision, with every name in it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: getattr(_Name("anything", (), {}), name)


# --- Eager or compiled ------------------------------------------------------------------------------------------------


def eager(module: nn.Module) -> nn.Module:
    """The module, unchanged."""
    return module


def compiled(module: nn.Module) -> Any:
    """Compiled with Inductor. On a CPU in eval mode the weights are frozen: constants, laid out once for the kernels."""
    # otherwise a ninth variant of the same code would run uncompiled, without a warning
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if next(module.parameters()).device.type != "cpu":
        return torch.compile(module, dynamic=False)
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import, and not needed for anything else
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise Unavailable("torch.compile needs a C++ compiler, and none is installed.") from error
    return torch.compile(module, dynamic=False, options={"freezing": not module.training})


def graphed(module: nn.Module) -> Any:
    """Compiled, with its kernels launched at once as a CUDA graph. A call overwrites the result of the one before."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(module, dynamic=False, mode="reduce-overhead")


def left_out(module: nn.Module) -> Any:
    """Takes the place of `compiled` in quick runs."""
    raise Unavailable("left out of a quick run.")


def ways(quick: bool, graphs: bool = False) -> dict[str, Callable[[nn.Module], Any]]:
    """The ways in which each module is measured. With `graphs`, also as a CUDA graph."""
    made = {"eager": eager, "compiled": compiled, **({"compiled, CUDA graph": graphed} if graphs else {})}
    return {way: left_out if quick and way != "eager" else prepare for way, prepare in made.items()}


# --- Runtimes ---------------------------------------------------------------------------------------------------------


@cache
def _exported() -> Path:
    """The shipped encoder as an ONNX graph, in a file that is removed when the process ends."""
    from omni.exchange.onnx import export  # needs the packages of the extra [onnx]

    folder = Path(tempfile.mkdtemp()) / "vision_tiny"
    atexit.register(shutil.rmtree, folder.parent)
    export(CHECKPOINTS / "vision_tiny", folder)
    return folder / "image_encoder.onnx"


def onnxruntime(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """onnxruntime, with as many threads as torch."""
    if dtype != torch.float32:
        raise Unavailable("onnxruntime has no bfloat16 on CPUs.")
    runtime, _ = _module("onnxruntime"), _module("onnxscript")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(_exported(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: _joined(session.run(["cls", "grid"], {"pixel_values": pixels.numpy()}))


def openvino(dtype: torch.dtype, requests: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """OpenVINO, with as many threads as torch. It splits a batch into `requests` parts and computes them in parallel."""
    runtime, _ = _module("openvino"), _module("onnxscript")
    model = runtime.Core().compile_model(
        str(_exported()),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY" if requests == 1 else "THROUGHPUT",
            "PERFORMANCE_HINT_NUM_REQUESTS": requests,
        },
    )
    queue = [model.create_infer_request() for _ in range(requests)]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        for request, part in zip(queue, pixels.float().chunk(requests), strict=True):
            request.start_async([part.numpy()], share_inputs=True)
        for request in queue:
            request.wait()
        parts = [_joined([request.get_tensor(name).data for name in ("cls", "grid")]) for request in queue]
        return parts[0] if requests == 1 else torch.cat(parts)

    return encode


def _joined(outputs: list[Any]) -> torch.Tensor:
    return torch.cat([torch.from_numpy(output) for output in outputs], dim=1)


def _module(name: str) -> Any:
    if find_spec(name) is None:
        raise Unavailable(f"{name} is not installed.")
    return import_module(name)


# --- Pictures and words -----------------------------------------------------------------------------------------------


def llava(config: OmniConfig, own_encoder: bool) -> LlavaForConditionalGeneration:
    """Stock Llava with the Thinker of a fused model; all weights are random.

    Args:
        config: configuration of the fused model.
        own_encoder: use omni's encoder, whose 196 patches are tokens. Otherwise use a CLIP tower of the same width and
            depth with 49 patches of 32 x 32. It gives 50 tokens, as many as `omni_tiny` has after folding.
    """
    section = config.modalities["image"]
    vision = copy.deepcopy(section["encoder"])
    if not own_encoder:
        vision = CLIPVisionConfig(
            image_size=vision.image_size,
            patch_size=2 * vision.patch_size,
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            hidden_act=vision.hidden_act,
        )
    made = LlavaConfig(
        vision_config=vision,
        text_config=copy.deepcopy(config.text_config),
        image_token_index=section["token_id"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if own_encoder else "full",
    )
    return LlavaForConditionalGeneration(made).eval()
