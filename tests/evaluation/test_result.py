"""A result names what it rests on: what changes shows in its own hash, and measuring again finds it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.checkpoints.folder import CheckpointError
from omni.checkpoints.seal import reseal
from omni.evaluation import (
    EvaluationError,
    Hashes,
    ManifestSettings,
    Result,
    choose_settings,
    evaluate,
    measure_again,
)
from omni.evaluation.hashes import hash_preprocessing
from omni.loading.checkpoint import load
from omni.scenes.evaluation import SceneSettings

Make = Callable[..., Path]
CAUSES = ("weights", "data", "prompts", "preprocessing")


@pytest.fixture
def data(make_manifest: Make) -> Path:
    return make_manifest()


def measure(checkpoint: Path, data: Path) -> Result:
    return evaluate(checkpoint, ManifestSettings(data=str(data))).result


def changed(then: Result, now: Result) -> set[str]:
    return {name for name in CAUSES if getattr(then.hashes, name) != getattr(now.hashes, name)}


# --- Hashes -----------------------------------------------------------------------------------------------------------


def test_the_same_again_has_the_same_hashes(fused: Path, data: Path) -> None:
    assert measure(fused, data).hashes == measure(fused, data).hashes


def test_hashes_are_of_what_they_say(fused: Path, data: Path) -> None:
    outcome = evaluate(fused, ManifestSettings(data=str(data)))
    hashes = outcome.result.hashes
    names = ("config.json", "generation_config.json", "model.safetensors")
    files = [f"{name} {hashlib.sha256((fused / name).read_bytes()).hexdigest()}\n" for name in names]
    assert hashes.weights == hashlib.sha256("".join(files).encode()).hexdigest()
    answers = [json.dumps([a.question, a.answer], separators=(",", ":")) + "\n" for a in outcome.asked]
    assert hashes.answers == hashlib.sha256("".join(answers).encode()).hexdigest()
    _, processor = load(fused)
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": a.question}]}] for a in outcome.asked
    ]
    written = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    ids = [processor.tokenizer.encode(text.replace("<image>", "<image>" * 50)) for text in written]
    prompts = [json.dumps(hashlib.sha256(json.dumps(each).encode()).hexdigest()) + "\n" for each in ids]
    assert hashes.prompts == hashlib.sha256("".join(prompts).encode()).hexdigest()


def test_the_hash_of_preprocessing_does_not_depend_on_earlier_batches(shipped: Any) -> None:
    before = hash_preprocessing(shipped[1])
    shipped[1].tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    assert hash_preprocessing(shipped[1]) == before


def edit_json(path: Path, *place: Any, value: Any) -> None:
    values = json.loads(path.read_text())
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(values))


def a_weight(copy: Path, data: Path) -> None:
    model, _ = load(copy)
    for path in copy.glob("familiarity*"):  # of the weights before
        path.unlink()
    weight = model.model.language_model.norm.weight
    weight.data[0] *= 1 + 1e-6
    model.save_pretrained(copy)


def a_setting_of_generation(copy: Path, data: Path) -> None:
    edit_json(copy / "generation_config.json", "repetition_penalty", value=1.0)


def an_expected_answer(copy: Path, data: Path) -> None:
    rows = data.read_text().splitlines()
    data.write_text("\n".join([json.dumps(json.loads(rows[0]) | {"answer": "plaid"}), *rows[1:]]))


def a_pixel(copy: Path, data: Path) -> None:
    picture = Image.open(data.parent / "0.png").convert("RGB")
    red, green, blue = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red ^ 1, green, blue))
    picture.save(data.parent / "0.png")


def a_mean_of_the_image_processor(copy: Path, data: Path) -> None:
    edit_json(copy / "processor_config.json", "image_processor", "image_mean", 0, value=0.501)


def a_remark_in_the_chat_template(copy: Path, data: Path) -> None:
    template = copy / "chat_template.jinja"
    template.write_text("{# what a user sees #}" + template.read_text())


def the_chat_template(copy: Path, data: Path) -> None:
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|user|>'", "'<|user|>please '"))


def a_question(copy: Path, data: Path) -> None:
    data.write_text(data.read_text().replace("what color is", "name the color of", 1))


CHANGES: dict[Callable[[Path, Path], None], set[str]] = {
    a_weight: {"weights"},
    a_setting_of_generation: {"weights"},
    an_expected_answer: {"data"},
    a_pixel: {"data"},
    a_mean_of_the_image_processor: {"preprocessing"},
    a_remark_in_the_chat_template: {"preprocessing"},
    the_chat_template: {"preprocessing", "prompts"},  # it is both a setting and what prompts are written with
    a_question: {"data", "prompts"},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_is_found_where_it_is(
    change: Callable[[Path, Path], None], fused: Path, copy: Path, data: Path
) -> None:
    then = measure(fused, data)
    change(copy, data)
    reseal(copy)
    comparison = measure_again(then, copy)
    assert comparison.outcome is not None
    assert changed(then, comparison.outcome.result) == CHANGES[change]
    assert {d.what for d in comparison.differences} & set(CAUSES) == CHANGES[change]
    assert comparison.elsewhere == []


def test_other_wordings_are_other_prompts_about_the_same_data(fused: Path) -> None:
    seen, held_out = (
        evaluate(fused, SceneSettings(pictures=3, wordings=wordings, kinds=("color",))).result
        for wordings in ("seen", "held_out")
    )
    assert changed(seen, held_out) == {"prompts"}


# --- Measuring again --------------------------------------------------------------------------------------------------


def test_the_same_is_the_same_wherever_the_checkpoint_lies(fused: Path, copy: Path, data: Path) -> None:
    then = Result.model_validate_json(measure(fused, data).model_dump_json())
    assert measure_again(then).differences == []
    moved = measure_again(then, copy)
    assert moved.differences == []
    assert moved.outcome is not None
    assert moved.outcome.result.checkpoint == str(copy)


def test_an_edited_score_is_found(fused: Path, tmp_path: Path) -> None:
    settings = SceneSettings(pictures=4, kinds=("color", "dark"), sight=True)
    path = tmp_path / "result.json"
    then = evaluate(fused, settings).result
    then.write(path)
    edit_json(path, "scores", 1, "accuracy", value=0.123)
    edit_json(path, "sight", "overall", "blank", "accuracy", value=0.456)
    found = measure_again(Result.read(path)).differences
    assert [difference.what for difference in found] == ["score 'dark'", "score of all with blank pictures"]
    assert found[0].then.startswith("0.123 of 4 (")
    assert found[0].now.startswith(f"{then.score('dark').accuracy:.3f} of 4 (")
    assert str(found[1]).startswith("score of all with blank pictures: 0.456 of 8 (")
    edit_json(path, "sight", "passed", value=None)
    with pytest.raises(EvaluationError, match="passed: Input should be a valid boolean"):
        Result.read(path)


def test_the_last_bit_of_a_score_and_the_verdict_are_compared(fused: Path) -> None:
    then = evaluate(fused, SceneSettings(pictures=4, kinds=("color", "dark"), sight=True)).result
    assert then.sight is not None
    low = then.scores[0].low
    scores = [then.scores[0].model_copy(update={"low": float(np.nextafter(low, 1))}), *then.scores[1:]]
    sight = then.sight.model_copy(update={"passed": not then.sight.passed})
    found = then.differences(then.model_copy(update={"scores": scores, "sight": sight, "stopped": 3}))
    assert [d.what for d in found] == ["score 'color'", "sight test", "answers that were stopped"]
    assert f'"low":{low!r}' in found[0].then
    assert [d.what for d in then.differences(then.model_copy(update={"sight": None}))][-2:] == [
        "score 'dark' with noise pictures",
        "sight test",
    ]
    assert [d.now for d in then.differences(then.model_copy(update={"scores": then.scores[:1]}))] == ["none"]


def test_damaged_weights_are_a_difference_too(fused: Path, copy: Path, data: Path) -> None:
    then = measure(fused, data)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = measure_again(then, copy)
    assert [difference.what for difference in found.differences] == ["weights", "loading"]
    assert "are not those that were saved with this configuration" in found.differences[1].now
    assert found.outcome is None


def test_a_checkpoint_that_is_gone_is_no_difference(fused: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config.json; expected the folder of a saved model"):
        measure_again(measure(fused, data), tmp_path)


def test_another_version_is_told_and_is_no_difference(fused: Path, data: Path) -> None:
    then = measure(fused, data)
    older = then.model_copy(update={"versions": then.versions | {"torch": "2.0.0"}})
    comparison = measure_again(older)
    assert comparison.differences == []
    assert [(d.what, d.then) for d in comparison.elsewhere] == [("torch", "2.0.0")]


# --- The document -----------------------------------------------------------------------------------------------------


def test_a_result_is_read_as_it_was_written(fused: Path, vision: Path, data: Path, tmp_path: Path) -> None:
    encoder = choose_settings(vision, pictures=10, fit_pictures=100, kinds=("dark",))
    for checkpoint, settings in ((fused, ManifestSettings(data=str(data))), (vision, encoder)):
        result = evaluate(checkpoint, settings).result
        result.write(tmp_path / "result.json")
        assert Result.read(tmp_path / "result.json") == result
        assert {"omni", "python", "torch", "transformers"} <= set(result.versions)
        assert result.device == "cpu, float32"
        assert (result.hashes.prompts is None) == (checkpoint is vision)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Invalid JSON: EOF"),
        ("{", "Invalid JSON: EOF"),
        ("[]", "should be an object"),
        ('{"model_type": "omni"}', "Field required"),
        ("\udcff", "is not JSON"),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EvaluationError, match=complaint) as error:
        Result.read(path)
    assert "\n" not in str(error.value)


def test_unknown_keys_and_values_of_a_result_are_refused(fused: Path, data: Path, tmp_path: Path) -> None:
    path, result = tmp_path / "result.json", measure(fused, data)
    for place, value, complaint in (
        (["more"], 1, "more: Extra inputs"),
        (["hashes", "more"], 1, "more: Extra inputs"),
        (["settings", "sigth"], True, "sigth: Extra inputs"),
        (
            ["settings", "about"],
            "something",
            "settings: `about` is one of scenes, manifest, classes, encoder, pictures, found 'something'",
        ),
        (["format"], "omni evaluation 2", "format: Input should be 'omni evaluation 1'"),
        (["scores", 0, "n"], "many", "n: Input should be a valid integer"),
    ):
        result.write(path)
        edit_json(path, *place, value=value)
        with pytest.raises(EvaluationError, match=complaint):
            Result.read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read: No such file"):
        Result.read(tmp_path / "result.json")


def test_settings_fit_the_checkpoint(fused: Path, vision: Path) -> None:
    assert choose_settings(fused).about == "scenes"
    assert choose_settings(fused, data="x.jsonl").about == "manifest"
    assert choose_settings(vision).about == "encoder"
    assert choose_settings(vision, data="x").about == "pictures"
    with pytest.raises(EvaluationError, match="is evaluated as 'encoder', which does not take --split;"):
        choose_settings(vision, split="test")
    with pytest.raises(EvaluationError, match="is evaluated as 'pictures', which does not take --split;"):
        choose_settings(vision, data="x", split="test")
    with pytest.raises(
        EvaluationError, match="which does not take --kind; it takes --sight, --strangers, --batch-size"
    ):
        choose_settings(fused, data="x", kinds=("color",))
    with pytest.raises(EvaluationError, match="--pictures of 'encoder': Input should be greater .* 10, found 3"):
        choose_settings(vision, pictures=3)
    with pytest.raises(CheckpointError, match="holds an encoder; this evaluation needs a fused model"):
        evaluate(vision, SceneSettings())


def test_every_hash_is_compared(fused: Path, data: Path) -> None:
    then = measure(fused, data)
    hashes = Hashes(**dict.fromkeys(Hashes.model_fields, "0" * 64))
    found = then.differences(then.model_copy(update={"hashes": hashes}))
    assert [difference.what for difference in found] == list(Hashes.model_fields)
    assert then.differences(then) == []
