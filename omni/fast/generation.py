"""Faster generation on a CPU. `install.py` puts it where `generate` asks for it.

Encoding and reading the prompt are products of many rows. `OneDnnProducts` passes them to oneDNN, for any tower, projector
or Thinker (`products.py`).

Writing is one token after the other. A small language model spends most of such a step between its products, in hundreds of
operations on a few numbers each. `QuickStep` computes the step of the common architecture (RMSNorm, rotary positions,
grouped attention, gated MLP: Llama, Mistral, Qwen2, Qwen3) with a third of the operations. With a C++ compiler it is one
operation (`compiled_layers.py`). Its cache has room for further tokens.

All of this reads the model's own weights, so no copy can become stale. It is not for training, for other devices, or for
other precisions than float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .compiled_layers import TOKENS, CompiledLayers, Dimensions, is_possible
from .products import HAS_ONEDNN, ROWS, OneDnnProducts, product

TOLERANCE = 1e-4
"""Largest difference between the quick step and the model's own step, relative to the largest number."""

ACTIVATIONS = (nn.SiLU, SiLUActivation)

LAYERS = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


class _Layer(NamedTuple):
    """The modules of one layer. Only Qwen3 has norms of queries and keys; they are None for the others."""

    input_norm: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_norm: Any
    key_norm: Any
    output: nn.Linear
    mlp_norm: nn.Module
    gate: nn.Linear
    up: nn.Linear
    activation: nn.Module
    down: nn.Linear

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attention, mlp = layer.self_attn, layer.mlp
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return cls(
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, *norms, attention.o_proj,
            layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj,
        )  # fmt: skip

    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down


class QuickStep:
    """Takes tokens through a Thinker whose cache holds the earlier ones: one token of each row, or a prompt."""

    def __init__(self, language_model: Any) -> None:
        self.layers = [_Layer.of(layer) for layer in language_model.layers]
        self.rotary, self.norm = language_model.rotary_emb, language_model.norm
        attention = language_model.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.compiled: CompiledLayers | None = None

    def compile(self) -> bool:
        """Compile the layers for a few tokens at a time. Returns whether that is possible."""
        first, query_norm = self.layers[0], self.layers[0].query_norm
        dimensions = Dimensions(
            width=first.query.in_features,
            inner=first.gate.out_features,
            heads=first.query.out_features // self.head_dim,
            groups=first.key.out_features // self.head_dim,
            depth=self.head_dim,
            epsilon=first.input_norm.variance_epsilon,  # type: ignore[arg-type]
            head_epsilon=query_norm.variance_epsilon if query_norm is not None else 0.0,
            scaling=self.scaling,
        )
        if isinstance(first.activation, ACTIVATIONS) and is_possible(dimensions):
            layers = [[part for part in layer if part is not layer.activation] for layer in self.layers]
            compiled = CompiledLayers(layers, self.norm, dimensions)
            if compiled.weights() is not None:  # a layer may have other shapes than the first
                self.compiled = compiled
        return self.compiled is not None

    def __call__(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, cache: Cache
    ) -> torch.Tensor:
        """Compute the last hidden state, float[B, n, T], and extend the cache.

        Args:
            hidden: float[B, n, T], the embedded tokens.
            mask: int64[B, L], 1 for tokens that are seen, of all L tokens with the new ones; None for all.
            positions: int64[B, n] of the new tokens; None to count them from the start of the row.
            cache: its layers hold keys and values float[B, G, L - n, D], for G groups of heads.
        """
        (batch, new), dim, held = hidden.shape[:2], self.head_dim, cache.get_seq_length()
        if positions is None:
            positions = torch.arange(held, held + new, device=hidden.device)[None]
        cos, sin = self.rotary(hidden, positions)  # float[B, n, D]
        sin = torch.cat([-sin[..., : dim // 2], sin[..., dim // 2 :]], dim=-1)
        if batch * new <= TOKENS and (done := self._run_compiled(hidden, mask, cos, sin, cache)) is not None:
            return done
        seen, cos, sin = _seen(mask, held, new), cos.unsqueeze(2), sin.unsqueeze(2)
        for own, cached in zip(self.layers, cache.layers, strict=True):
            x = _norm(own.input_norm, hidden)
            query = _linear(own.query, x).view(batch, new, -1, dim)
            key = _linear(own.key, x).view(batch, new, -1, dim)
            value = _linear(own.value, x).view(batch, new, -1, dim)
            heads, groups = query.shape[2], key.shape[2]
            both = torch.cat([query, key], dim=2)
            if own.query_norm is not None:
                weights = own.query_norm.weight.expand(heads, -1), own.key_norm.weight.expand(groups, -1)
                both = _normed(both, own.query_norm.variance_epsilon) * torch.cat(weights)
            both = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin)
            keys, values = cached.update(both[:, :, heads:].transpose(1, 2), value.transpose(1, 2))
            query = both[:, :, :heads]
            if new == 1:  # the heads of a group share keys and values: they are its queries
                query = query.view(batch, groups, heads // groups, dim)
                read = F.scaled_dot_product_attention(query, keys, values, seen, scale=self.scaling)
            else:
                query = query.transpose(1, 2)
                read = F.scaled_dot_product_attention(query, keys, values, seen, scale=self.scaling, enable_gqa=True)
                read = read.transpose(1, 2)
            hidden = hidden + _linear(own.output, read.reshape(batch, new, -1))
            x = _norm(own.mlp_norm, hidden)
            hidden = hidden + _linear(own.down, own.activation(_linear(own.gate, x)) * _linear(own.up, x))
        return _norm(self.norm, hidden)

    def _run_compiled(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, cache: Cache
    ) -> torch.Tensor | None:
        compiled = self.compiled
        if compiled is None or not hidden.is_cpu or any(type(layer) is not RoomyLayer for layer in cache.layers):
            return None
        if (weights := compiled.weights()) is None:
            return None
        (batch, new, _), held = hidden.shape, cache.get_seq_length()
        like = hidden.new_empty(batch, compiled.groups, new, self.head_dim)
        caches = [tensor for layer in cache.layers for tensor in layer.extend(like, like)]
        seen = None if mask is None or mask.all() else mask.bool()
        cos, sin = (part.expand(batch, new, -1) for part in (cos, sin))
        return compiled(weights, hidden, seen, cos, sin, caches, held)


def _seen(mask: torch.Tensor | None, held: int, new: int) -> torch.Tensor | None:
    """bool[B, 1, n, L], true where a new token sees another; None for a single token that sees everything."""
    mask = None if mask is None or mask.all() else mask[:, None, None].bool()
    if new == 1:
        return mask
    places = torch.arange(held + new, device="cpu")[None]
    own = places[:, held:].T
    # padding sees itself, since the average of nothing is not a number
    return (places <= own)[None, None] if mask is None else (mask & (places <= own)) | (places == own)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last axis, with its weight."""
    return _normed(x, norm.variance_epsilon) * norm.weight


def _normed(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + epsilon) over the last axis. The mean is one product of each row with itself."""
    rows = x.reshape(-1, 1, x.shape[-1])
    squares = torch.baddbmm(x.new_full((1, 1, 1), epsilon), rows, rows.mT, alpha=1 / x.shape[-1])
    return (rows * squares.rsqrt_()).view(x.shape)


def _linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer's product, float[B, n, I] -> float[B, n, O], in the fastest way for this number of rows."""
    rows = x.shape[0] * x.shape[1]
    if HAS_ONEDNN and rows >= ROWS:
        return product(x, linear.weight, linear.bias)
    if rows == 1:
        return F.linear(x, linear.weight, linear.bias)
    # for 4 rows, W x^T is faster than x W^T by a third, if x is stored row by row
    few = torch.mm(linear.weight, x.reshape(rows, -1).contiguous().t()).t()
    return (few if linear.bias is None else few + linear.bias).view(*x.shape[:2], -1)


# --- Where it is used -------------------------------------------------------------------------------------------------

_WRITING: ContextVar[bool] = ContextVar("writing", default=False)
_CURRENT: ContextVar[QuickStep | None] = ContextVar("quick step", default=None)
_KNOWN: WeakKeyDictionary[nn.Module, "_Known"] = WeakKeyDictionary()


@contextmanager
def stepping(language_model: Any) -> Iterator[None]:
    """Inside of the block, `quick_step` returns the step of this Thinker, if it has one.

    A Thinker has one if all of its parts are plain, known modules in float32 on the CPU. With adapters, quantised weights,
    hooks, other kernels, sliding windows or another architecture it has none. Nor has it one if the step differs by more
    than `TOLERANCE`, which is measured once, on random rows.
    """
    found = _step_of(language_model)
    step, writing = _CURRENT.set(found), _WRITING.set(True)
    try:
        yield
    finally:
        _CURRENT.reset(step)
        _WRITING.reset(writing)
        if found is not None and found.compiled is not None:
            found.compiled.release()


def prefilling() -> AbstractContextManager[Any]:
    """Products by oneDNN while `generate` reads a prompt. A quick step has them by itself, so it needs no context."""
    return OneDnnProducts() if _WRITING.get() and _CURRENT.get() is None else nullcontext()


def _step_of(language_model: Any) -> QuickStep | None:
    config = language_model.config
    if config.output_attentions or config.output_hidden_states or language_model.training:
        return None
    known = _KNOWN.get(language_model)
    if known is not None and known.still_holds(language_model):
        return known.step
    _KNOWN.pop(language_model, None)
    if not _is_plain(language_model):
        return None
    step = QuickStep(language_model)
    if _difference(step, language_model) > TOLERANCE:
        return None
    if step.compile() and not _difference(step, language_model) <= TOLERANCE:
        step.compiled = None
    _KNOWN[language_model] = _Known.of(step, language_model)
    return step


class _Known(NamedTuple):
    """A step, the modules of its Thinker without the Thinker itself, and the children of each, the Thinker's first."""

    step: QuickStep
    modules: list[nn.Module]
    children: list[tuple[nn.Module | None, ...]]

    @classmethod
    def of(cls, step: QuickStep, language_model: nn.Module) -> "_Known":
        _, *modules = language_model.modules()
        return cls(step, modules, [_children(module) for module in (language_model, *modules)])

    def still_holds(self, language_model: nn.Module) -> bool:
        """Whether the Thinker still has the same modules, and each does what its class says."""
        return all(
            not _is_changed(module) and _children(module) == children
            for module, children in zip((language_model, *self.modules), self.children, strict=True)
        )


def _children(module: nn.Module) -> tuple[nn.Module | None, ...]:
    return tuple(vars(module)["_modules"].values())


def quick_step(
    language_model: Any,
    cache: Cache | None,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    options: Mapping[str, Any],
) -> QuickStep | None:
    """The step for a forward pass of the Thinker with these arguments; None if the Thinker has to compute it.

    Args:
        language_model: the Thinker.
        cache: the Thinker's cache.
        hidden: float[B, n, T], the embedded tokens.
        mask: the attention mask.
        options: the other arguments.
    """
    step = _CURRENT.get()
    if (
        step is None
        or cache is None
        or step.norm is not language_model.norm
        or hidden.dtype != torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or any(value is not None for key, value in options.items() if key not in ("use_cache", "return_dict"))
        or type(cache) is not DynamicCache
        or any(type(layer) not in (DynamicLayer, RoomyLayer) for layer in cache.layers)
    ):
        return None
    length = cache.get_seq_length() + hidden.shape[1]
    plain = mask is None or (isinstance(mask, torch.Tensor) and mask.shape == (len(hidden), length))
    return step if plain else None


def _is_plain(language_model: Any) -> bool:
    config, layers = language_model.config, getattr(language_model, "layers", None)
    if not layers or any(f"{type(layer).__module__}.{type(layer).__qualname__}" not in LAYERS for layer in layers):
        return False
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if windows or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    if any(type(linear) is not nn.Linear for layer in layers for linear in _Layer.of(layer).linears()):
        return False
    return not any(map(_is_changed, language_model.modules()))


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more than its class says, or computes on another device or in another precision."""
    own: Any = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return True
    for weight in own["_parameters"].values():
        if weight is not None and not (
            type(weight) is nn.Parameter and weight.dtype is torch.float32 and weight.is_cpu
        ):
            return True
    return False


@torch.no_grad()
def _difference(step: QuickStep, language_model: Any) -> float:
    """The step's difference from the model, relative to the largest number, on two rows of which one has padding."""
    generator, width = torch.Generator("cpu").manual_seed(0), language_model.config.hidden_size
    rows = torch.randn(2, 4, width, generator=generator, dtype=torch.float32, device="cpu")
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], device="cpu")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = language_model(inputs_embeds=rows, attention_mask=mask, position_ids=positions).last_hidden_state
    cache = give_room(DynamicCache(config=language_model.config))
    prompt = step(rows[:, :3], mask[:, :3], positions[:, :3], cache)
    found = torch.cat([prompt, step(rows[:, 3:], mask, positions[:, 3:], cache)], dim=1)
    return float((found - expected)[mask.bool()].abs().max() / expected.abs().max())


# --- The cache --------------------------------------------------------------------------------------------------------

ROOM = 64
"""The smallest number of tokens that a layer of the cache makes room for at once."""


def give_room(cache: Any) -> Any:
    """Give an empty `DynamicCache` of transformers room for further tokens. Other caches are returned unchanged."""
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values, float[B, G, L, D], at the beginning of longer tensors.

    transformers' own layer copies everything it holds for each new token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._longer: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, float[B, G, n, D]. Returns all that the layer holds."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and key_states.requires_grad):
            both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        held = self.get_seq_length()
        keys, values = self.extend(key_states, value_states)
        keys[..., held : self.keys.shape[-2], :] = key_states
        values[..., held : self.values.shape[-2], :] = value_states
        return self.keys, self.values

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for n more tokens. The caller writes their keys and values, float[B, G, n, D].

        Returns:
            The longer tensors, float[B, G, room, D].
        """
        held = self.get_seq_length()
        length = held + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._has_room(length):
            room = length + max(ROOM, length // 2)
            self._longer = [new.new_empty(*new.shape[:-2], room, new.shape[-1]) for new in (key_states, value_states)]
            if held:
                self._longer[0][..., :held, :] = self.keys  # type: ignore[has-type]
                self._longer[1][..., :held, :] = self.values  # type: ignore[has-type]
        keys, values = self._longer
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return keys, values

    def _has_room(self, length: int) -> bool:
        """Whether keys and values are still the beginning of the longer tensors. Beams, for one, replace them."""
        if not self._longer or self._longer[0].shape[-2] < length:
            return False
        if self._longer[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch refuses to write into it
        return all(
            part.data_ptr() == longer.data_ptr() and part.stride() == longer.stride() and len(part) == len(longer)
            for part, longer in zip((self.keys, self.values), self._longer, strict=True)
        )
