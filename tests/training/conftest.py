"""What the tests of training share: models that train in milliseconds."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_encoder() -> dict[str, Any]:
    """Settings of an encoder; its dropout is that of a new encoder."""
    return {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="session")
def tiny_thinker() -> dict[str, Any]:
    """Configuration of a language model."""
    return {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "tie_word_embeddings": True,
    }
