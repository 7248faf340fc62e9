"""A fused model of other people's parts: they stay what they were, what was settled is said, and recipes go on from it."""

import copy
import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)
from typer.testing import CliRunner

from omni import OmniForConditionalGeneration, OmniProcessor
from omni.checkpoints.folder import CheckpointError
from omni.cli.app import app
from omni.data.conversations import ask
from omni.exchange.chats import AS_TEXT
from omni.exchange.compose import compose
from omni.items import Item
from omni.loading.checkpoint import load
from omni.session import answer
from omni.training.recipe import Recipe
from omni.training.run import run
from omni.training.tokenizer import CHAT_TEMPLATE, train_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TURNS = (
    "{% for message in messages %}<|user|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
"""A chat template as most language models have one: it takes contents for text."""
PICTURE = Image.new("RGB", (40, 30), "red")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny random models, as transformers writes them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")

    def save(name: str, model: PreTrainedModel, *others: Any) -> None:
        for parameter in model.parameters():  # also what starts as zeros and ones
            parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
        for thing in (model, *others):
            thing.save_pretrained(root / name)

    vision, text = {**SMALL, "image_size": 32, "patch_size": 8}, {**SMALL, "vocab_size": 64, "eos_token_id": 1}
    size = {"height": 32, "width": 32}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    save("clip", CLIPModel(clip), CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size))
    siglip = SiglipConfig(text_config=text, vision_config=vision)
    save("siglip", SiglipModel(siglip), SiglipImageProcessorPil(size=size))
    dino = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=48
    )
    save("dino", Dinov2Model(dino).half(), BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=size))
    tokenizer = train_tokenizer(["what shape is it", "a red circle"] * 4, 300, placeholders={})
    tokenizer.pad_token = None
    tokenizer.chat_template = CHAT_TEMPLATE.replace("PLACEHOLDERS", '{"image": "<image>"}')  # it takes pictures
    bare, turns = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    bare.chat_template, turns.chat_template = None, TURNS
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None}
    gqa = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}
    save("llama", LlamaForCausalLM(LlamaConfig(**gqa, **{**ids, "vocab_size": 320})).bfloat16(), turns)
    save("qwen", Qwen3ForCausalLM(Qwen3Config(**gqa, **ids, tie_word_embeddings=True)), tokenizer)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, tie_word_embeddings=False, **ids)
    save("gpt2", GPT2LMHeadModel(gpt2), bare)
    save("bert", BertForMaskedLM(BertConfig(**SMALL, vocab_size=len(tokenizer))), bare)
    return root


DINO = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
"""transformers writes DINOv2 under names that it had before."""


def renamed(name: str) -> str | None:
    """Where a tensor of an encoder stands in the fused model; None if it is not of the encoder."""
    for old, new in DINO.items():
        name = name.replace(old, new)
    outside = re.match(r"text_|logit_|visual_projection", name)
    return None if outside else f"model.image_tower.{name.removeprefix('vision_model.')}"


PAIRS = [("clip", "llama"), ("siglip", "gpt2"), ("dino", "qwen")]


@pytest.fixture(scope="module", params=PAIRS, ids="+".join)
def composed(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tower, thinker = request.param
    composition = compose(parts / tower, parts / thinker)
    folder = composition.save(tmp_path_factory.mktemp("composed") / "mine")
    return parts / tower, parts / thinker, folder, composition


def test_the_weights_of_both_parts_are_those_of_their_sources(composed: Any) -> None:
    tower, thinker, folder, _ = composed
    found = load_file(folder / "model.safetensors")
    source = {renamed(name): tensor for name, tensor in load_file(tower / "model.safetensors").items()}
    expected = {name: tensor for name, tensor in source.items() if name is not None}
    prefix = {"llama": "model.", "qwen": "model.", "gpt2": "transformer."}[thinker.name]
    for name, tensor in load_file(thinker / "model.safetensors").items():
        inside = name.startswith(prefix)
        expected[f"model.language_model.{name.removeprefix(prefix)}" if inside else name] = tensor
    new = {name for name in found if "image_projector" in name}
    assert new
    assert found.keys() - new == expected.keys()
    for name, tensor in expected.items():
        same = (
            found[name][: len(tensor)]
            if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
            else found[name]
        )
        if tower.name != "dino" or "image_tower" not in name:  # float16 beside float32: see the test of precision
            assert same.dtype == tensor.dtype
        assert torch.equal(same, tensor.to(same.dtype)), name


def test_each_part_computes_what_it_computed_before(composed: Any) -> None:
    tower, thinker, folder, _ = composed
    model, ids = OmniForConditionalGeneration.from_pretrained(folder), torch.arange(20)[None]
    classes = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "qwen": Qwen3ForCausalLM}
    stock = classes[thinker.name].from_pretrained(thinker, dtype=torch.float32)
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(
            model(input_ids=ids).logits[..., : expected.shape[-1]], expected, atol=1e-6, rtol=1e-6
        )
    if tower.name == "clip":
        prepared = AutoImageProcessor.from_pretrained(tower)(PICTURE, return_tensors="pt")
        ours = OmniProcessor.from_pretrained(folder).image_processor(PICTURE, return_tensors="pt")
        assert torch.equal(prepared["pixel_values"], ours["pixel_values"])
        with torch.no_grad():
            expected = CLIPVisionModel.from_pretrained(tower)(**prepared).last_hidden_state
            assert torch.equal(model.model.image_tower(**ours).last_hidden_state, expected)


def test_no_id_and_no_row_moves_for_the_placeholder(composed: Any) -> None:
    _, thinker, folder, composition = composed
    before, after = (AutoTokenizer.from_pretrained(each).get_vocab() for each in (thinker, folder))
    assert after == {**before, "<image>": len(before)}
    rows, config = len(composition.model.get_input_embeddings().weight), composition.model.config
    assert rows == config.text_config.vocab_size == (320 if thinker.name == "llama" else len(before) + 1)
    said = "free" if thinker.name == "llama" else "grow to"
    assert sum(said in note for note in composition.notes) == 1
    text = "what <shape> is a red circle"
    assert AutoTokenizer.from_pretrained(thinker)(text) == AutoTokenizer.from_pretrained(folder)(text)


def test_the_projector_counts_as_untrained(composed: Any) -> None:
    _, thinker, folder, composition = composed
    assert composition.model.config.untrained == ["image_projector"]
    texts = torch.tensor([[7, 8, 9]])
    placeholder = composition.processor.image_token_id  # an id that this random language model writes as any other
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [placeholder]}
    expected = AutoModelForCausalLM.from_pretrained(thinker).generate(texts, **options)
    assert composition.model.generate(texts, **options).equal(expected)  # which has nothing to do with it
    assert json.loads((folder / "config.json").read_text())["untrained"] == ["image_projector"]
    with pytest.raises(CheckpointError, match="image_projector is untrained"):
        load(folder)


def test_no_path_of_this_machine_is_kept(composed: Any) -> None:
    *_, folder, _ = composed
    for path in folder.glob("*.json"):
        assert str(folder.parent.parent) not in path.read_text(), path.name


def test_numbers_of_two_precisions_are_loaded_as_they_were(parts: Path, tmp_path: Path) -> None:
    """float16 and float32, float32 and bfloat16: the wider holds both."""
    for tower, thinker in (("dino", "qwen"), ("clip", "llama"), ("dino", "llama")):
        composition = compose(parts / tower, parts / thinker)
        folder = composition.save(tmp_path / f"{tower}_{thinker}")
        model = OmniForConditionalGeneration.from_pretrained(folder)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert sum("precision" in note for note in composition.notes) == 1
        for name, source, part in (("embed_tokens.weight", thinker, "language_model"), ("norm", tower, "image_tower")):
            tensors = load_file(parts / source / "model.safetensors")
            key = next(key for key in tensors if name in key and "text_model" not in key)
            inner = key.removeprefix("model.").removeprefix("vision_model.")
            assert torch.equal(model.state_dict()[f"model.{part}.{inner}"][: len(tensors[key])], tensors[key].float())


def test_the_same_parts_make_the_same_checkpoint(parts: Path, composed: Any) -> None:
    tower, thinker, _, composition = composed
    torch.manual_seed(123)
    again = compose(tower, thinker).model.state_dict()
    for name, tensor in composition.model.state_dict().items():
        if "image_projector" in name:
            assert torch.equal(tensor, again[name])


# --- Chats ------------------------------------------------------------------------------------------------------------

CHATS = [
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "what shape is it"}],
    [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "{{ c }}"},
    ],
]


def test_a_template_for_text_writes_text_as_before_and_pictures_too(parts: Path) -> None:
    before = AutoTokenizer.from_pretrained(parts / "llama")
    composition = compose(parts / "clip", parts / "llama")
    for chat in CHATS:
        for more in (False, True):
            expected = before.apply_chat_template(chat, tokenize=False, add_generation_prompt=more)
            blocks = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
            for each in (chat, blocks):
                written = composition.processor.apply_chat_template(each, tokenize=False, add_generation_prompt=more)
                assert written == expected
    shown = composition.processor.apply_chat_template(ask("why", items=["image"] * 2), tokenize=False)
    assert shown == "<|user|>user\n<image><image>why<|end|>\n"
    assert any("takes text alone" in note for note in composition.notes)


def test_a_template_that_holds_pictures_is_kept(parts: Path) -> None:
    composition = compose(parts / "clip", parts / "qwen")
    assert composition.processor.chat_template == AutoTokenizer.from_pretrained(parts / "qwen").chat_template
    assert "the chat template is kept" in composition.notes


def test_without_a_template_there_is_a_plain_one(parts: Path) -> None:
    composition = compose(parts / "clip", parts / "gpt2")
    tokenizer = composition.processor.tokenizer
    assert composition.processor.chat_template.startswith(AS_TEXT.replace("PLACEHOLDERS", '{"image": "<image>"}'))
    written = tokenizer.apply_chat_template(ask("what shape", "circle"), tokenize=False)
    assert written == "User: <image>what shape\nAssistant: circle<|end|>\n"
    prompt = tokenizer.apply_chat_template(ask("what shape"), tokenize=False, add_generation_prompt=True)
    assert prompt == "User: <image>what shape\nAssistant:"
    assert any("User: ..." in note for note in composition.notes)


def test_blocks_of_other_kinds_are_refused_by_the_template(parts: Path) -> None:
    tokenizer = compose(parts / "clip", parts / "gpt2").processor.tokenizer
    with pytest.raises(Exception, match="Blocks are text and image, found video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def test_padding_with_the_end_of_text_changes_no_answer(parts: Path) -> None:
    composition = compose(parts / "clip", parts / "llama")
    assert composition.processor.tokenizer.pad_token == "<|end|>"
    processor, model = composition.processor, composition.model
    chats = [
        ask("what shape is it, is it a red circle", items=[Item("image", PICTURE)]),
        ask("red", items=[Item("image", PICTURE)]),
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    wide = processor.apply_chat_template(chats, processor_kwargs={"padding": True, "padding_side": "left"}, **options)
    alone = processor.apply_chat_template(chats[1], **options)
    both, one = (
        model.generate(**inputs, max_new_tokens=6, do_sample=False, allow_untrained=True)[-1, -6:]
        for inputs in (wide, alone)
    )
    assert torch.equal(both, one)


def test_a_tokenizer_that_has_the_placeholder_keeps_its_id(parts: Path, tmp_path: Path) -> None:
    folder = copied(parts / "llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>", "<more>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    composition = compose(parts / "clip", folder)
    assert composition.processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert composition.model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert any("the tokenizer has <image> already" in note for note in composition.notes)


# --- What cannot work -------------------------------------------------------------------------------------------------


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def without_tensor(folder: Path, pattern: str) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not re.search(pattern, name)}  # noqa: SIM118
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def another_width(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))


def endless(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def too_many_words(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(60)])
    tokenizer.save_pretrained(folder)


def short(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8}))


def other_size(folder: Path) -> None:
    CLIPImageProcessorPil().save_pretrained(folder)


REFUSED: list[tuple[str, str, str, Callable[[Path], None] | None, str]] = [
    ("nowhere", "llama", "image", None, "does not exist; expected the folder"),
    ("llama", "llama", "image", None, "of type 'llama' is no encoder of pictures; name the folder of one"),
    ("clip", "clip", "thinker", None, "of type 'clip', which is no causal language model"),
    ("clip", "bert", "thinker", None, "BertLMHeadModel .* looks at later words"),
    ("clip", "llama", "image", lambda f: without(f, "preprocessor_config.json"), "no preprocessor_config.json"),
    ("clip", "llama", "image", lambda f: without(f, "model.safetensors"), "cannot be used: .*model.safetensors"),
    (
        "clip",
        "llama",
        "image",
        lambda f: without_tensor(f, "vision.*k_proj.weight"),
        r"missing: encoder.layers.0.*k_proj",
    ),
    ("clip", "llama", "image", other_size, "The encoder in .* cannot be used: .*224"),
    ("clip", "llama", "thinker", lambda f: without_tensor(f, "lm_head"), "missing: lm_head.weight"),
    ("clip", "llama", "thinker", another_width, "of another shape: model.layers.0.mlp.down_proj.weight"),
    ("clip", "llama", "thinker", cut_off, "damaged|cannot be used"),
    ("clip", "llama", "thinker", lambda f: without(f, "tokenizer.json"), "The tokenizer in .* cannot be used"),
    ("clip", "llama", "thinker", endless, "no end-of-text token"),
    ("clip", "llama", "thinker", too_many_words, "ids up to .* only 320 embeddings"),
    ("clip", "llama", "thinker", short, "do not work together: a picture and a word are .* tokens"),
]


@pytest.mark.parametrize(
    ("image", "thinker", "which", "change", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", v)
)
def test_what_cannot_work_is_refused(
    parts: Path, tmp_path: Path, image: str, thinker: str, which: str, change: Any, message: str
) -> None:
    folders = {"image": parts / image, "thinker": parts / thinker}
    if change is not None:
        folders[which] = copied(folders[which], tmp_path / "changed")
        change(folders[which])
    with pytest.raises(CheckpointError, match=message):
        compose({"image": folders["image"]}, folders["thinker"])


def test_an_encoder_among_strangers_is_whole_but_alone_it_may_have_no_strangers(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    CLIPVisionModel.from_pretrained(parts / "clip").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((parts / "clip/preprocessor_config.json").read_bytes())
    compose(folder, parts / "llama")
    tensors = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    save_file({**tensors, "encoder.stranger": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.stranger"):
        compose(folder, parts / "llama")


def test_a_projector_has_to_fit_the_grid(parts: Path) -> None:
    for factor, tokens in ((None, 5), (1, 17), (4, 2)):
        config = compose(parts / "clip", parts / "llama", factor=factor).model.config
        assert config.num_tokens("image", (4, 4)) == tokens
    with pytest.raises(ValueError, match="grid of 4x4 patches is not divisible by 3"):
        compose(parts / "clip", parts / "llama", factor=3)
    with pytest.raises(ValueError, match="known: linear, mlp, unshuffle_mlp"):
        compose(parts / "clip", parts / "llama", projector="resampler")


# --- From there on ----------------------------------------------------------------------------------------------------


def recipe(checkpoint: Path, output: Path, *more: str) -> Recipe:
    fast = ["arguments.max_steps=2", "arguments.per_device_train_batch_size=2", "arguments.dataloader_num_workers=0"]
    own = [f"model.checkpoint={checkpoint}", "model.image=null", "evaluate=null", f"output={output}"]
    return Recipe.read("configs/train_projector.json", [*own, *fast, "arguments.report_to=none", *more])


@pytest.mark.parametrize("thinker", ["llama", "gpt2"])
def test_a_recipe_trains_the_projector_and_then_it_answers(parts: Path, tmp_path: Path, thinker: str) -> None:
    """With a chat template that was made to hold pictures, and with the plain one."""
    folder = compose(parts / "clip", parts / thinker).save(tmp_path / "mine")
    trained = run(recipe(folder, tmp_path / "trained", "optimizer.lr=0.1"))
    before, after = (OmniForConditionalGeneration.from_pretrained(each).state_dict() for each in (folder, trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("image_projector" in name for name in changed)
    model, processor = load(trained)
    assert model.config.untrained == []
    said = answer(model, processor, [PICTURE, PICTURE], "what shape is it", max_new_tokens=3)
    assert said.tokens_written <= 3


def test_a_projector_that_does_not_learn_stays_untrained(parts: Path, tmp_path: Path) -> None:
    folder = compose(parts / "clip", parts / "qwen").save(tmp_path / "mine")
    trained = run(recipe(folder, tmp_path / "trained", 'freeze=["image_projector"]'))
    with pytest.raises(CheckpointError, match="image_projector is untrained"):
        load(trained)


def test_adapters_that_bring_the_projector_with_them(parts: Path, tmp_path: Path) -> None:
    folder = compose(parts / "clip", parts / "qwen").save(tmp_path / "mine")
    lora = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["image_projector"]}
    adapters = run(recipe(folder, tmp_path / "both", "freeze=[]", f"lora={json.dumps(lora)}"))
    assert load(adapters)[0].config.untrained == []
    del lora["modules_to_save"]
    with pytest.raises(CheckpointError, match="image_projector is untrained"):
        load(run(recipe(folder, tmp_path / "one", "freeze=[]", f"lora={json.dumps(lora)}")))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_command_says_what_it_did_and_refuses_in_a_sentence(parts: Path, tmp_path: Path) -> None:
    words = [
        "compose",
        "--image",
        str(parts / "clip"),
        "--thinker",
        str(parts / "qwen"),
        str(tmp_path / "mine"),
        "--json",
    ]
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["untrained"] == ["image_projector"]
    assert len(made["notes"]) >= 4
    again = invoke(*words)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr
    nothing = invoke("compose", "--image", str(parts / "clip"))
    assert nothing.exit_code == 2
    assert "Expected two folders and a new one" in nothing.stderr


def test_what_the_document_says_works(parts: Path, tmp_path: Path) -> None:
    """Its commands and its Python, in a folder where what it names is there (and much smaller)."""
    document, configs = Path("docs/compose.md").read_text(encoding="utf-8"), Path("configs").absolute()
    (tmp_path / "clip-vit-base-patch16").symlink_to(parts / "clip")
    (tmp_path / "Qwen2.5-0.5B-Instruct").symlink_to(parts / "qwen")
    (tmp_path / "configs").symlink_to(configs)
    for bird in ("wren", "robin"):
        (tmp_path / "birds" / bird).mkdir(parents=True)
        PICTURE.save(tmp_path / "birds" / bird / "a.png")
    with chdir(tmp_path):
        for block in re.findall(r"^```bash\n(.*?)^```$", document, re.DOTALL | re.MULTILINE):
            program, *words = shlex.split(block.replace("\\\n", ""))
            assert program == "omni"
            if words[0] == "train":
                words += ["--set", "arguments.max_steps=1", "--set", "arguments.dataloader_num_workers=0"]
            done = invoke(*words)
            assert done.exit_code == 0, (block, done.stderr, done.exception)
            assert words[0] != "compose" or "The projector is untrained" in done.stdout
        (script,) = re.findall(r"^```python\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
        exec(script, {})
        assert Path("other/config.json").is_file()


def test_a_language_model_that_needs_a_cache_of_its_own_is_refused(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "minimax"
    shutil.copytree(parts / "llama", folder, ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    config = AutoConfig.for_model(
        "minimax",
        **SMALL,
        vocab_size=320,
        head_dim=16,
        num_key_value_heads=1,
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(
        CheckpointError, match="language model in .*minimax.* cannot be used: MiniMax uses cache of its own"
    ):
        compose(parts / "clip", folder)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_projected_tokens_start_as_large_as_embedded_words(parts: Path, tmp_path: Path, family: str) -> None:
    """Gemma multiplies its embeddings, so they are measured as they leave the embedding."""
    folder = parts / "llama"
    if family == "gemma":
        shutil.copytree(folder, folder := tmp_path / "gemma", ignore=shutil.ignore_patterns("*.safetensors", "config*"))
        config = GemmaConfig(
            **SMALL, vocab_size=320, num_key_value_heads=1, head_dim=16, eos_token_id=1, bos_token_id=None
        )
        GemmaForCausalLM(config).save_pretrained(folder)
    model, processor = (composed := compose(parts / "clip", folder)).model, composed.processor
    pixels = processor(images=[PICTURE], text=["<image>"], return_tensors="pt")["pixel_values"]
    tokens = torch.cat(model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output).float()
    words = model.get_input_embeddings()(torch.arange(320)).float()
    assert 0.4 < tokens.square().mean().sqrt() / words.square().mean().sqrt() < 2.5
    assert (family == "gemma") == (words.square().mean().sqrt() > 2 * model.get_input_embeddings().weight.float().std())


def test_a_projector_can_be_whitened_and_get_positions(parts: Path, tmp_path: Path) -> None:
    items = [Image.effect_noise((40, 30), 20 * number).convert("RGB") for number in range(1, 9)]
    composed = compose(parts / "clip", parts / "llama", positions=True, items={"image": items})
    section = composed.model.config.modalities["image"]
    assert (section["positions"], section["whitened"]) == ([2, 2], True)
    composed.save(tmp_path / "mine")
    loaded = OmniForConditionalGeneration.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    pixels = torch.randn(2, 3, 32, 32)
    for one, other in zip(
        *(model.float().get_image_features(pixel_values=pixels).pooler_output for model in (composed.model, loaded)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
