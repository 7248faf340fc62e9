"""The seam: an acceleration is asked at every point where it may replace the reference, and nothing else changes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from omni import OmniForConditionalGeneration
from omni.fusion import acceleration
from omni.fusion.acceleration import Acceleration, current, install, using

Make = Callable[..., OmniForConditionalGeneration]


class Noting(Acceleration):
    """The reference, which notes what it is asked; it computes each step itself, by the Thinker."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encoding(self) -> AbstractContextManager[Any]:
        self.asked.append("encoding")
        return super().encoding()

    def writing(self, language_model: Any) -> AbstractContextManager[Any]:
        self.asked.append("writing")
        return super().writing(language_model)

    def reading(self) -> AbstractContextManager[Any]:
        self.asked.append("reading")
        return super().reading()

    def step(
        self, language_model: Any, hidden: torch.Tensor, mask: Any, positions: Any, cache: Any, options: Any
    ) -> torch.Tensor | None:
        self.asked.append(f"step of {hidden.shape[1]}")
        given = {"inputs_embeds": hidden, "attention_mask": mask, "position_ids": positions}
        done: torch.Tensor = language_model(**given, past_key_values=cache).last_hidden_state
        return done


def write(model: OmniForConditionalGeneration) -> list[int]:
    ids = torch.tensor([[5, 3, 3, 3, 3, 3, 7, 9]])
    torch.manual_seed(0)
    pictures = {"pixel_values": torch.randn(1, 3, 16, 16), "attention_mask": torch.ones_like(ids)}
    written = model.generate(input_ids=ids, **pictures, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    return written[0].tolist()


def test_generate_asks_at_every_point_and_says_the_same(make_model: Make) -> None:
    model, noting = make_model("qwen3", "omni_vision"), Noting()
    with using(Acceleration()):
        expected = write(model)
    with using(noting):
        assert write(model) == expected
    assert set(noting.asked) == {"writing", "encoding", "reading", "step of 8", "step of 1"}
    assert noting.asked.count("step of 1") == 3


def test_a_cache_that_the_caller_brings_is_used(make_model: Make) -> None:
    model, noting = make_model("qwen3", "omni_vision"), Noting()
    cache = DynamicCache(config=model.config.text_config)
    with using(noting):
        model.generate(input_ids=torch.tensor([[5, 7]]), past_key_values=cache, max_new_tokens=2, eos_token_id=-1)
    assert cache.get_seq_length() == 3


def test_what_is_used_is_used_here_and_what_is_installed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here, everywhere, seen = Acceleration(), Acceleration(), []
    monkeypatch.setattr(acceleration, "_installed", current())  # as before at the end
    with using(here):
        install(everywhere)
        thread = Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        assert current() is here
        with using(Acceleration()):
            assert current() is not here
        assert current() is here
    assert current() is everywhere
    assert seen == [everywhere]
