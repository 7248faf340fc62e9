"""What vLLM and SGLang ask of a model that they serve through transformers' modeling backend, step by step.

`Server` takes the steps that they take, in their order and with their arguments (vLLM: models/transformers/base.py and
multimodal.py; SGLang: models/transformers.py): the base model with attention and linear layers of the server's own, prompts
expanded from the replacements that the processor names, requests side by side in one row, keys and values kept outside.
The server's attention gets to a layer in one of two ways: it comes with each step (`attention_instances`: SGLang, and vLLM
before 0.30), or the layer has it (`attn`: vLLM from 0.30 on).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoModel, CLIPImageProcessorPil, ProcessorMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omni import OmniConfig, OmniFeatureExtractor, OmniForConditionalGeneration, OmniProcessor

Pair = Callable[..., tuple[Any, Any]]
NAME = "omni_test_served"
GQA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
WAYS = ["attn", "attention_instances"]


@dataclass
class Attention:
    """The server's attention of one layer: keys and values of each request, and whose tokens now stand where."""

    batch: list[tuple[str, int]] = field(default_factory=list)  # requests in the row, and how many tokens of each
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        outputs, start = [], 0
        for request, length in self.batch:
            new = slice(start, start := start + length)
            for kept, added in ((self.keys, key), (self.values, value)):
                kept[request] = torch.cat([*([kept[request]] if request in kept else []), added[:, :, new]], dim=2)
            past = self.keys[request].shape[2] - length
            mask = torch.ones(length, past + length, dtype=torch.bool).tril(past)
            outputs.append(
                F.scaled_dot_product_attention(
                    query[:, :, new], self.keys[request], self.values[request], mask, scale=scaling, enable_gqa=True
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    attention_instances: Mapping[int, Attention] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None
    attention = module.attn if attention_instances is None else attention_instances[module.layer_idx]
    return attention(query, key, value, scaling), None


@pytest.fixture(autouse=True)
def _attention() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]


class Linear(nn.Module):
    """Stands for the server's own linear layers, which are no nn.Linear."""

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = replaced.weight, replaced.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)


def give_attention(model: Any, instances: Mapping[int, Any], way: str) -> dict[str, Any]:
    """Put the server's attention where its layers find it; what each step passes."""
    if way == "attention_instances":
        return {way: instances}
    layers = [module for module in model.language_model.modules() if hasattr(module, "layer_idx")]
    assert [layer.layer_idx for layer in layers] == list(instances)
    for layer in layers:
        layer.attn = instances[layer.layer_idx]
    return {}


def serve_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.get_text_config()._attn_implementation = NAME
    config.dtype = torch.float32
    return config


class Server:
    def __init__(self, model: Any, processor: Any, way: str = "attn") -> None:
        config = serve_config(model)
        assert config != config.get_text_config()  # how they know a model of several modalities
        self.processor, self.head = processor, model.lm_head
        self.model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True).eval()
        saved = model.state_dict()
        weights = {name.removeprefix("model."): saved[name] for name in saved if not name.startswith("lm_head.")}
        self.model.load_state_dict(weights)
        for parent in [*self.model.modules()]:
            for name, child in [*parent.named_children()]:
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Linear(child))
        embedding = nn.Embedding(config.get_text_config().vocab_size, config.get_text_config().hidden_size)
        embedding.load_state_dict(self.model.get_input_embeddings().state_dict())
        self.model.set_input_embeddings(embedding)
        assert self.model.get_input_embeddings() is embedding
        self.instances = {i: Attention() for i in range(config.get_text_config().num_hidden_layers)}
        self.passed = give_attention(self.model, self.instances, way)

    def expand(self, prompt: str, images: list[Image.Image]) -> tuple[list[int], list[int], torch.Tensor | None]:
        """The prompt's ids with a placeholder for each picture replaced, where those are, and the tokens that go there."""
        if not images:
            return self.processor.tokenizer.encode(prompt, add_special_tokens=False), [], None
        made = self.processor(
            text=self.processor.image_token * len(images),  # a text for the pictures alone, which may come from a cache
            images=images,
            return_text_replacement_offsets=True,
            truncation=False,
            add_special_tokens=False,
            return_tensors="pt",
        )
        tokenizer = self.processor.tokenizer
        entries = made["text_replacement_offsets"][0]
        assert [entry["type"] for entry in entries] == ["image"] * len(images)
        replacements = iter([tokenizer.encode(each["replacement"], add_special_tokens=False) for each in entries])
        (target,) = tokenizer.encode(self.processor.image_token, add_special_tokens=False)
        ids: list[int] = []
        places: list[int] = []
        for token in tokenizer.encode(prompt, add_special_tokens=False):
            replacement = next(replacements, []) if token == target else []
            places += range(len(ids), len(ids) + len(replacement))
            ids += replacement or [token]
        patches = self.processor._get_num_multimodal_tokens(
            image_sizes=[(image.height, image.width) for image in images]
        )
        assert sum(patches["num_image_patches"]) == len(made["pixel_values"])
        features = self.model.get_image_features(made["pixel_values"]).pooler_output
        assert [len(each) for each in features] == patches["num_image_tokens"]
        assert all(each.ndim == 2 for each in features)
        return ids, places, torch.cat(list(features))

    def step(self, rows: dict[str, torch.Tensor], starts: dict[str, int]) -> dict[str, int]:
        """Next words of requests, of each of which some embeddings float[L, T] are new."""
        for instance in self.instances.values():
            instance.batch = [(request, len(embeds)) for request, embeds in rows.items()]
        positions = torch.cat([starts[request] + torch.arange(len(rows[request])) for request in rows])
        outputs = self.model(
            input_ids=None,
            inputs_embeds=torch.cat(list(rows.values()))[None],
            use_cache=False,
            position_ids=positions[None],
            return_dict=False,
            **self.passed,
        )
        logits = self.head(outputs[0][0])
        logits[:, self.processor.image_token_id] = -torch.inf
        last = np.cumsum([len(embeds) for embeds in rows.values()]) - 1
        return {request: int(logits[i].argmax()) for request, i in zip(rows, last, strict=True)}

    @torch.inference_mode()
    def answer(self, requests: dict[str, tuple[str, list[Image.Image]]], count: int) -> dict[str, list[int]]:
        waiting, starts, written = {}, dict.fromkeys(requests, 0), {request: list[int]() for request in requests}
        embed = self.model.get_input_embeddings()
        for request, (prompt, images) in requests.items():
            ids, places, features = self.expand(prompt, images)
            waiting[request] = embed(torch.tensor(ids))
            if features is not None:
                waiting[request][places] = features
        while any(len(words) < count for words in written.values()):
            rows = {request: embeds[:5] for request, embeds in waiting.items() if len(written[request]) < count}
            words = self.step(rows, starts)
            for request, word in words.items():
                starts[request] += len(rows[request])
                waiting[request] = waiting[request][5:]  # long prompts are read in several steps, beside others
                if not len(waiting[request]):
                    written[request].append(word)
                    waiting[request] = embed(torch.tensor([word]))
        return written


def photo(value: int, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("output", ["cls+grid", "cls"])
def test_a_server_with_its_own_attention_answers_as_generate_does(make_pair: Pair, output: str, way: str) -> None:
    model, processor = make_pair(output=output)
    assert type(model).is_backend_compatible()
    assert isinstance(processor, ProcessorMixin)
    requests = {
        "one": ("<|user|><image>what shape is it<|assistant|>", [photo(0)]),
        "two": ("<|user|>how many <image> and <image> here<|assistant|>", [photo(1), photo(2, (9, 90))]),
        "text": ("<|user|>a red circle<|assistant|>", []),
    }
    found = Server(model, processor, way).answer(requests, 6)
    for name, (prompt, images) in requests.items():
        inputs = processor(text=prompt, images=images or None, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1)
        assert found[name] == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_a_placeholder_without_a_picture_ends_no_server(make_pair: Pair, way: str) -> None:
    """It is in a user's text, where the server tokenises prompts itself, or was sampled: it is read as a word."""
    model, processor = make_pair()
    good = {"good": ("<|user|><image>what shape is it<|assistant|>", [photo(0)])}
    bad = {
        "none": ("<|user|>what is <image> here<|assistant|>", []),
        "one too many": ("<|user|><image>what is <image> here<|assistant|>", [photo(1)]),
    }
    alone = Server(model, processor, way).answer(good, 4)
    server = Server(model, processor, way)
    assert server.answer({**bad, **good}, 4)["good"] == alone["good"]
    placeholder = model.get_input_embeddings()(torch.tensor([processor.image_token_id]))
    with torch.inference_mode():
        assert server.step({"sampled": placeholder}, {"sampled": 0})
        # a server that was told to read no pictures leaves it to the model to embed
        ids = torch.tensor([[processor.image_token_id]])
        assert server.model(
            input_ids=ids, position_ids=ids * 0 + 1, use_cache=False, **server.passed
        ).last_hidden_state.shape
    with pytest.raises(ValueError, match="Row 0 has 1 placeholders"):  # where no server is
        model.model(input_ids=torch.tensor([[processor.image_token_id]]))


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_random_parts_is_not_served(make_pair: Pair, way: str) -> None:
    """Servers run a step when they start."""
    model, processor = make_pair()
    model.config.untrained = ["image_projector"]
    server = Server(model, processor, way)
    words = {"one": torch.zeros(3, model.config.text_config.hidden_size)}
    with pytest.raises(ValueError, match=r"untrained, .*\['image_projector'\].* before they are served"):
        server.step(words, {"one": 0})
    server.model.config.untrained = []
    assert server.step(words, {"one": 0})


def test_the_parts_are_where_servers_look(make_pair: Pair) -> None:
    model, processor = make_pair()
    base = AutoModel.from_config(serve_config(model))
    assert base.get_encoder(modality="image") is base.image_tower
    assert base.get_encoder(modality="audio") is base  # none
    assert base.get_decoder() is base.language_model
    assert base.language_model.config._attn_implementation == NAME
    assert base.image_tower.config._attn_implementation != NAME
    assert {"colwise", "rowwise"} <= set(base.tp_plan.values())
    assert all(name.startswith("language_model.") for name in base.tp_plan)
    assert any(name.endswith(".layers") for name in base._pp_plan)
    assert not hasattr(processor, "video_processor")
    assert not hasattr(processor, "feature_extractor")
    marks = processor(
        text="a<image>b", images=[photo(0)], return_mm_token_type_ids=True, return_tensors="pt"
    )  # how older versions of vLLM find an item
    assert (marks["mm_token_type_ids"] == (marks["input_ids"] == processor.image_token_id)).all()


@pytest.mark.parametrize("way", WAYS)
def test_forward_reads_no_number_and_keeps_nothing(make_pair: Pair, way: str) -> None:
    """It is captured as a CUDA graph: on "meta", where there are no numbers, reading one would raise."""
    model, _ = make_pair()
    with torch.device("meta"):
        base = AutoModel.from_config(serve_config(model)).eval()
    width = base.config.get_text_config().hidden_size
    passed = give_attention(base, {i: lambda query, *_: query.transpose(1, 2) for i in range(2)}, way)

    def forward() -> None:
        base(
            inputs_embeds=torch.empty(1, 7, width, device="meta"),
            position_ids=torch.arange(7, device="meta")[None],
            use_cache=False,
            return_dict=False,
            **passed,
        )

    def state() -> list[dict[str, Any]]:
        return [dict(vars(module)) for module in base.modules()]

    forward()  # transformers installs its hooks on first use
    before = state()
    forward()
    for old, new in zip(before, state(), strict=True):
        assert old.keys() == new.keys()
        assert all(old[key] is new[key] for key in old)


def test_pictures_beside_ids_as_sglang_passes_them(make_pair: Pair) -> None:
    model, processor = make_pair()
    server = Server(model, processor, "attention_instances")
    assert "pixel_values" in inspect.signature(server.model.get_image_features).parameters
    inputs = processor(text="a<image>b", images=[photo(0)], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    for instance in server.instances.values():
        instance.batch = [("one", length)]
    with torch.inference_mode():
        found = server.model(
            input_ids=inputs["input_ids"],
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.arange(length)[None],
            return_dict=False,
            forward_batch=object(),
            attention_instances=server.instances,
            pixel_values=inputs["pixel_values"],
        )[0]
        expected = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", [[(20, 30)], [(1, 1), (10_000, 3)]])
def test_the_tokens_of_sizes_are_told_of_processors_that_crop_too(
    make_pair: Pair, sizes: list[tuple[int, int]]
) -> None:
    model, _ = make_pair()
    _, processor = make_pair()
    crops = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16})
    cropping = OmniProcessor(image_processor=crops, tokenizer=processor.tokenizer, modalities=model.config.modalities)
    for each in (processor, cropping):
        expected = [len(each(text="<image>", images=[photo(0)])["input_ids"][0])] * len(sizes)
        assert each._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == expected
    crops.do_center_crop = False
    with pytest.raises(ValueError, match="number of tokens of a picture is not known: size of the image processor is"):
        cropping._get_num_multimodal_tokens(image_sizes=sizes)


def test_sounds_are_expanded_and_encoded_as_vllm_does_it(tokenizer: Any) -> None:
    """Each alone, as its lengths differ: what the model makes of it is as long as what the processor wrote for it."""
    encoder = {"model_type": "omni_audio", "num_mel_bins": 20, "hidden_size": 24, "num_hidden_layers": 1}
    encoder |= {"num_attention_heads": 2, "intermediate_size": 32}
    hearing = copy.deepcopy(tokenizer)
    hearing.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>"]})
    section = {"encoder": encoder, "token_id": hearing.convert_tokens_to_ids("<audio>"), "projector": "mlp"}
    thinker = {"model_type": "qwen3", **GQA, "vocab_size": len(hearing)}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities={"audio": section}, text_config=thinker)).eval()
    extractor = OmniFeatureExtractor(num_mel_bins=20)
    processor = OmniProcessor(tokenizer=hearing, feature_extractor=extractor, modalities=model.config.modalities)
    assert processor.audio_token_id == section["token_id"]
    assert model.get_encoder(modality="audio") is model.model.audio_tower
    sounds = [np.sin(np.arange(length) / 7).astype(np.float32) for length in (8_000, 3_000, 500)]
    made = processor(
        text=processor.audio_token * 3,
        audio=sounds,
        return_text_replacement_offsets=True,
        truncation=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    (entries,) = made["text_replacement_offsets"]
    assert [entry["type"] for entry in entries] == ["audio"] * 3
    written = [len(hearing.encode(entry["replacement"], add_special_tokens=False)) for entry in entries]
    assert written == processor._get_num_multimodal_tokens(audio_lengths=map(len, sounds))["num_audio_tokens"]
    together = model.get_audio_features(made["audio_features"], made["audio_mask"]).pooler_output
    for sound, count, features in zip(sounds, written, together, strict=True):
        one = processor(text=processor.audio_token, audio=[sound], return_tensors="pt")
        (alone,) = model.get_audio_features(one["audio_features"], audio_mask=one["audio_mask"]).pooler_output
        assert len(alone) == count
        torch.testing.assert_close(alone, features, rtol=0, atol=1e-5)
