"""An encoder that was trained with captions finds pictures by words, and ranks them as the trained model does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni.checkpoints.folder import CheckpointError
from omni.embedding import embed, search
from omni.training.contrastive import ContrastiveAlignment
from omni.training.recipe import Recipe
from omni.vision.pictures import read_picture

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: dict[str, Any]) -> tuple[Any, Path, Path]:
    """The objective with weights that tell pictures apart, the folder that it saves, and the pictures."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "pictures").mkdir()
    rows = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (16, 16), colour).save(folder / "pictures" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a {colour} square"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    recipe = Recipe.model_validate(
        {
            "objective": "contrastive",
            "model": {
                "config": tiny_encoder,
                "text": {"model_type": "bert", **tiny_encoder, "max_position_embeddings": 32},
                "vocab_size": 300,
                "projection_dim": 16,
            },
            "train": {"path": str(folder / "pictures")},
            "optimizer": {"lr": 1e-3},
            "arguments": {"max_steps": 1},
            "output": str(folder / "out"),
        }
    )
    torch.manual_seed(0)
    objective = ContrastiveAlignment(recipe)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    objective.model.eval()
    (folder / "encoder").mkdir()
    objective.save(objective.model, folder / "encoder")
    return objective, folder / "encoder", folder / "pictures"


@pytest.mark.parametrize("normalize", [False, True])
def test_words_find_what_the_trained_model_finds(
    trained: tuple[Any, Path, Path], normalize: bool, tmp_path: Path
) -> None:
    objective, encoder, pictures = trained
    table = tmp_path / "out.parquet"
    embed([pictures / "*.png"], encoder, table, normalize=normalize, threads=1)
    texts = ["a red square", "a black"]  # the second is shorter, and its vector the same beside the first
    files = sorted(pictures.glob("*.png"))
    batch = objective.collate([(read_picture(file), "x") for file in files])
    words = objective.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        output = objective.model(pixel_values=batch["pixel_values"], **words)
    cosines = (output.text_embeds @ output.image_embeds.T).numpy()
    for text, expected in zip(texts, cosines, strict=True):
        hits = search(table, text=text, most=6)
        found = {hit.file: hit.similarity for hit in hits}
        assert [found[file] for file in files] == pytest.approx(expected.tolist(), abs=1e-4)
        assert [*found.values()] == sorted(found.values(), reverse=True)
        assert np.ptp(expected) > 0.01, "the pictures are told apart"


def test_a_text_encoder_of_another_encoder_is_refused(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    objective, _, pictures = trained
    (tmp_path / "other").mkdir()
    objective.save(objective.model, tmp_path / "other")
    with torch.no_grad():
        model = type(objective.model.vision_model).from_pretrained(tmp_path / "other")
        next(model.parameters()).add_(1)
        model.save_pretrained(tmp_path / "other")
    embed([pictures / "*.png"], tmp_path / "other", tmp_path / "out.parquet", threads=1)
    with pytest.raises(CheckpointError, match="was trained with another encoder"):
        search(tmp_path / "out.parquet", text="a red square")
