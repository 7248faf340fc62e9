"""Every causal language model of transformers as a Thinker: its logits are those of the stock class, or it is refused.

Each type gets a small configuration with random weights. Types that have none here are skipped.
"""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from omni import OmniConfig, OmniForConditionalGeneration

pytestmark = pytest.mark.long

LENGTH, IMAGE, LARGEST = 128, 3, 10_000_000
IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    32: ("hidden_size", "d_model", "n_embd", "dim", "attention_hidden_size", "word_embed_proj_dim", "lru_width"),
    48: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts_per_tok"),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
    ),
    LENGTH: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    16: ("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "sliding_window"),
    8: ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "query_pre_attn_scalar", "index_head_dim"),
    1: ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"),
    64: ("vocab_size_per_layer_input",),
}
SIZES = IDS | {name: size for size, names in SMALL.items() for name in names}
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
GROUPED = {**HEADS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": LENGTH}
SLIDING = {**GROUPED, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**HEADS, "num_key_value_heads": 2, **STATES, "attn_layer_indices": [1]},
    "bert-generation": {**HEADS, "is_decoder": True},
    "falcon": HEADS,
    "falcon_h1": {**HEADS, "num_key_value_heads": 2, **STATES, "mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "gemma3n_text": {**SLIDING, **PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**SLIDING, **PER_LAYER},
    "gpt_neo": {
        **IDS,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "granitemoehybrid": {**HEADS, "num_key_value_heads": 2, **STATES, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": GROUPED,
    "jamba": {**HEADS, "num_experts": 2, "mamba_d_state": 8, "attn_layer_offset": 1, "attn_layer_period": 2},
    "ministral": SLIDING,
    "nemotron": GROUPED,
}
ALWAYS = {
    "deepseek_v3", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt2", "granite", "llama",
    "mistral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen3", "qwen3_5_text", "smollm3",
}  # fmt: skip
"""Those that docs/compose.md names are neither skipped nor refused."""
BY_COMPOSE = ("cpmant", "deepseek_v4", "minimax")
"""These raise only when they run. `compose` tries them, and refuses them."""
ROWS = [[5, *[IMAGE] * 5, 9, 11], [7, 8, 9, 10, *[IMAGE] * 5, 12, 13, 14]]
LONGEST = max(map(len, ROWS))


def small(model_type: str) -> dict[str, Any]:
    """A configuration as a dictionary."""
    cls = CONFIG_MAPPING[model_type]
    if model_type in OWN:
        return {"model_type": model_type, **OWN[model_type]}
    default, chosen = cls(), dict[str, Any]()
    for name, size in {**SIZES, "num_key_value_heads": 4 if hasattr(default, "kv_lora_rank") else 2}.items():
        attribute = getattr(cls, name, None)
        if hasattr(default, name) and not (isinstance(attribute, property) and attribute.fset is None):
            chosen[name] = size
    if hasattr(default, "head_dim") and not hasattr(default, "kv_lora_rank"):
        chosen["head_dim"] = 8
    if kinds := list(dict.fromkeys(getattr(default, "layer_types", None) or [])):
        chosen |= {"layer_types": (kinds * 2)[: max(2, len(kinds))], "num_hidden_layers": max(2, len(kinds))}
    return {"model_type": model_type, **{k: v for k, v in chosen.items() if cls.attribute_map.get(k) not in chosen}}


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_right_or_refused(model_type: str, make_config: Any) -> None:
    try:
        text = small(model_type)
        config = CONFIG_MAPPING[model_type](**{name: value for name, value in text.items() if name != "model_type"})
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
        assert size < LARGEST, f"{size:,} parameters"
        stock = AutoModelForCausalLM.from_config(config).eval()
        stock(torch.tensor([[5, 9]]))
    except Exception as error:
        if model_type in ALWAYS:
            raise
        pytest.skip(f"no small configuration: {type(error).__name__}: {str(error)[:90]}")
    torch.manual_seed(0)
    model, refusal = None, ""
    try:
        model = OmniForConditionalGeneration(OmniConfig(modalities=make_config().modalities, text_config=text)).eval()
    except ValueError as error:
        refusal = str(error)
    if model is None:
        assert model_type not in ALWAYS, refusal
        said = ("the Thinker is a causal language model", "Choose another language model", "Unrecognized configuration")
        assert any(reason in refusal for reason in said)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.data = noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.1
        if model_type in BY_COMPOSE:
            with pytest.raises((ValueError, AttributeError, RuntimeError)):
                written(model, {"input_ids": torch.tensor([[5, 9, 11]])})
            return
        getattr(stock, stock.base_model_prefix).load_state_dict(model.model.language_model.state_dict())
        stock.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
        words = torch.tensor([[5, 9, 11, 7, 13]])
        same(model(input_ids=words).logits, stock(words).logits)
        pictures, ones = torch.randn(2, 3, 16, 16), [torch.ones(1, len(row), dtype=torch.long) for row in ROWS]
        alone = [
            {"input_ids": torch.tensor([row]), "attention_mask": mask, "pixel_values": picture[None]}
            for row, mask, picture in zip(ROWS, ones, pictures, strict=True)
        ]
        together = {
            "input_ids": torch.tensor([[0] * (LONGEST - len(row)) + row for row in ROWS]),
            "attention_mask": torch.tensor([[0] * (LONGEST - len(row)) + [1] * len(row) for row in ROWS]),
            "pixel_values": pictures,
        }
        logits = model(**together).logits
        for i, row in enumerate(alone):
            same(logits[i, -len(ROWS[i]) :], model(**row).logits[0])
        answers = [written(model, row)[0] for row in alone]
        assert answers == [written(model, row, use_cache=False)[0] for row in alone]
        assert answers == written(model, together)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-3 * max(1.0, expected.abs().max().item())


def written(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)
    return out[:, -5:].tolist()
