"""The image processor against the same steps written out with PIL and numpy."""

import base64
import io
import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from omni.checkpoints.seal import reseal
from omni.vision.image_processing_vision import OmniImageProcessor
from omni.vision.pictures import PictureError, read_picture


def picture(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def expected(image: Image.Image, size: tuple[int, int] = (224, 224), mean=0.5, std=0.5) -> torch.Tensor:
    """float[1, 3, H, W]; `size` is (height, width)."""
    resized = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = (np.asarray(resized, dtype=np.float64) / 255 - mean) / std
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()


def process(images, **options) -> torch.Tensor:
    return OmniImageProcessor(**options)(images, return_tensors="pt")["pixel_values"]


class TestArithmetic:
    @pytest.mark.parametrize(("width", "height"), [(70, 50), (50, 70), (224, 224), (640, 30), (1, 1)])
    def test_squash_scale_normalise(self, width, height) -> None:
        image = picture(width, height)
        found = process(image)
        assert found.shape == (1, 3, 224, 224)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected(image), rtol=0, atol=1e-6)

    def test_plain_values_of_the_seed(self) -> None:
        image = picture()
        found = process(image, do_normalize=False)
        torch.testing.assert_close(found, expected(image, mean=0, std=1), rtol=0, atol=1e-6)
        assert found.min() >= 0
        assert found.max() <= 1

    def test_the_whole_range(self) -> None:
        assert process(Image.new("RGB", (8, 8), (0, 0, 0))).unique().tolist() == [-1]
        assert process(Image.new("RGB", (8, 8), (255, 255, 255))).unique().tolist() == [1]
        red = process(Image.new("RGB", (8, 8), (255, 0, 0)), do_normalize=False)[0]
        assert red.flatten(1).mean(1).tolist() == [1, 0, 0]  # channels are red, green, blue

    def test_own_statistics_and_size(self) -> None:
        image, mean, std = picture(), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
        found = process(image, size={"height": 32, "width": 48}, image_mean=mean, image_std=std)
        torch.testing.assert_close(found, expected(image, (32, 48), mean, std), rtol=0, atol=1e-6)
        assert process(image, size=64).shape == (1, 3, 64, 64)

    def test_shrinking_is_antialiased(self) -> None:
        stripes = np.zeros((448, 448, 3), dtype=np.uint8)
        stripes[:, ::2] = 255  # one pixel white, one black: half of each, and no pattern, is left
        found = process(Image.fromarray(stripes), do_normalize=False)[0, 0, 100, 8:-8]
        torch.testing.assert_close(found, torch.full_like(found, 0.5), rtol=0, atol=0.01)


class TestKindsOfPictures:
    @pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "YCbCr", "HSV", "I"])
    def test_modes(self, mode) -> None:
        image = picture().convert(mode)
        torch.testing.assert_close(process(image), expected(image.convert("RGB")), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
    def test_opaque_alpha(self, mode) -> None:
        image = picture().convert("P" if mode == "PA" else mode).convert(mode)
        torch.testing.assert_close(process(image), expected(image.convert("RGB")), rtol=0, atol=1e-6)

    def test_transparency_shows_white(self) -> None:
        pixels = np.dstack([np.asarray(picture()), np.zeros((50, 70), dtype=np.uint8)])
        pixels[:20, :, 3] = 255
        white = np.where(pixels[..., 3:] == 0, 255, pixels[..., :3]).astype(np.uint8)
        found = process(Image.fromarray(pixels))
        torch.testing.assert_close(found, expected(Image.fromarray(white)), rtol=0, atol=1e-6)
        torch.testing.assert_close(process(pixels), found, rtol=0, atol=0)

    @pytest.mark.parametrize(
        "convert",
        [
            np.asarray,
            lambda image: np.asarray(image).transpose(2, 0, 1),
            lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        ],
        ids=["numpy HWC", "numpy CHW", "torch CHW"],
    )
    def test_arrays(self, convert) -> None:
        torch.testing.assert_close(process(convert(picture())), expected(picture()), rtol=0, atol=1e-6)

    def test_file(self, tmp_path) -> None:
        picture().save(tmp_path / "picture.png")
        found = OmniImageProcessor().fetch_images(str(tmp_path / "picture.png"))
        torch.testing.assert_close(process(found), expected(picture()), rtol=0, atol=1e-6)

    def test_list_of_different_sizes(self) -> None:
        images = [picture(70, 50), picture(30, 200, seed=1), picture(9, 9, seed=2).convert("L")]
        found = process(images)
        assert found.shape == (3, 3, 224, 224)
        for row, image in zip(found, images, strict=True):
            torch.testing.assert_close(row[None], expected(image.convert("RGB")), rtol=0, atol=1e-6)

    def test_numpy_without_torch_tensors(self) -> None:
        found = OmniImageProcessor()([picture()], return_tensors="np")["pixel_values"]
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected(picture()).numpy(), atol=1e-6)

    def test_what_is_no_picture(self) -> None:
        for mistake in (None, 3, {"image": picture()}):
            with pytest.raises((TypeError, ValueError)):
                process(mistake)
        with pytest.raises(ValueError, match=r"nowhere\.png"):
            process("nowhere.png")

    @pytest.mark.parametrize(
        "fractions",
        [
            np.asarray(picture(), dtype=np.float32) / 255,
            np.asarray(picture()).transpose(2, 0, 1) / 255,
            (np.asarray(picture()) > 127).astype(np.float64),  # black and white
            np.asarray(picture()) > 127,
            (np.asarray(picture()) / 255 - 0.5) / 0.5,  # already normalised
            torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 255,
        ],
        ids=["float32", "CHW", "black and white", "bool", "normalised", "torch"],
    )
    def test_values_that_would_be_divided_twice(self, fractions) -> None:
        for options in ({}, {"do_resize": False}):
            with pytest.raises(
                ValueError, match="values from 0 to 255, found an array of .* to 1.*; pass do_rescale=False"
            ):
                process(fractions, **options)

    def test_floats_are_taken_as_they_are_when_told(self) -> None:
        fractions = np.asarray(picture(), dtype=np.float32) / 255
        torch.testing.assert_close(process(fractions, do_rescale=False), expected(picture()), rtol=0, atol=1e-6)

    def test_floats_from_0_to_255_and_black_are_pictures(self) -> None:
        whole = np.asarray(picture(), dtype=np.float32)
        torch.testing.assert_close(process(whole), expected(picture()), rtol=0, atol=1e-6)
        assert process(0 * whole).unique().tolist() == [-1]
        assert process(np.ones((8, 8, 3), dtype=np.uint8)).unique().tolist() == pytest.approx([2 / 255 - 1])

    def test_misspelt_settings(self) -> None:
        sentence = "OmniImageProcessor knows no 'do_normalise'; its settings are .*do_normalize"
        with pytest.raises(TypeError, match=sentence):
            OmniImageProcessor()(picture(), do_normalise=False)
        with pytest.raises(TypeError, match=sentence):
            OmniImageProcessor(do_normalise=False)

    def test_misspelt_setting_beside_a_file(self, tmp_path) -> None:
        OmniImageProcessor().save_pretrained(tmp_path)
        for loader in (OmniImageProcessor, AutoImageProcessor):
            with pytest.raises(TypeError, match="OmniImageProcessor knows no 'do_normalise'; its settings are"):
                loader.from_pretrained(tmp_path, do_normalise=False)
        assert not OmniImageProcessor.from_pretrained(tmp_path, do_normalize=False, local_files_only=True).do_normalize

    def test_misspelt_setting_in_a_file(self, tmp_path) -> None:
        OmniImageProcessor().save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalise": False}))
        reseal(tmp_path)
        with pytest.raises(TypeError, match="knows no 'do_normalise'"):
            OmniImageProcessor.from_pretrained(tmp_path)


def scene() -> np.ndarray:
    """uint8[60, 90, 3], in blocks that a JPEG file keeps."""
    return np.asarray(picture(9, 6)).repeat(10, 0).repeat(10, 1)


def phone() -> Image.Image:
    """Held upright, stored on its side."""
    return Image.fromarray(np.rot90(scene()))


def cutout() -> Image.Image:
    """Transparent on the left, where black lies beneath, as editors write it."""
    alpha = np.full((60, 90), 255, np.uint8)
    alpha[:, :45] = 0
    return Image.fromarray(np.dstack([scene() * (alpha[..., None] > 0), alpha]).astype(np.uint8))


def grey16() -> Image.Image:
    return Image.fromarray(scene()[..., 0].astype(np.uint16) * 257)


class TestEveryWay:
    """A file has the same pixels whichever way it comes."""

    @pytest.fixture(params=["phone.jpg", "cutout.png", "grey16.png"])
    def path(self, request, tmp_path) -> Path:
        exif = Image.Exif()
        exif[0x0112] = 6
        {"phone.jpg": phone, "cutout.png": cutout, "grey16.png": grey16}[request.param]().save(
            tmp_path / request.param,
            **({"exif": exif, "quality": 100, "subsampling": 0} if request.param == "phone.jpg" else {}),
        )
        return tmp_path / request.param

    @pytest.fixture
    def site(self, tmp_path, monkeypatch) -> Iterator[str]:
        monkeypatch.setattr("omni.downloads.is_public", "127.0.0.1".__eq__)

        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *args) -> None:
                """Nothing on the terminal."""

        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def test_all_are_read_picture(self, path, site) -> None:
        found = read_picture(path)
        upright = {"phone.jpg": scene(), "cutout.png": np.where(np.arange(90)[:, None] < 45, 255, scene())}
        shown = upright.get(path.name, scene()[..., :1].repeat(3, 2))
        assert np.abs(np.asarray(found).astype(int) - shown).max() <= 12
        data = path.read_bytes()
        encoded = base64.b64encode(data).decode()
        ways = [
            str(path), path, data, Image.open(path), Image.open(io.BytesIO(data)), encoded,
            f"data:image/png;base64,{encoded}", f"{site}/{path.name}",
        ]  # fmt: skip
        loaded = Image.open(path)
        loaded.load()
        for way in [*ways, loaded, ways, [[str(path)], [Image.open(path)]]]:
            for row in process(way, size=64):
                assert torch.equal(row, process(found, size=64)[0]), way

    def test_what_cannot_be_read_says_why_whichever_way_it_comes(self, tmp_path, site) -> None:
        cut = tmp_path / "cut.png"
        picture().save(cut)
        cut.write_bytes(cut.read_bytes()[:400])
        encoded = base64.b64encode(cut.read_bytes()).decode()
        for way in (str(cut), cut, cut.read_bytes(), Image.open(cut), encoded, f"data:,{encoded}", f"{site}/cut.png"):
            with pytest.raises(PictureError, match="data that end too early"):
                process(way)
        with pytest.raises(PictureError, match=r"nothing.png' cannot be fetched \(HTTP Error 404.*check the address"):
            process(f"{site}/nothing.png")
        with pytest.raises(PictureError, match=r"'nowhere.png' does not exist"):
            process("nowhere.png")

    def test_pictures_of_one_colour_stay_so_where_that_is_asked_for(self) -> None:
        grey = process(picture().convert("L"), do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
        assert grey.shape == (1, 1, 224, 224)


class TestSaving:
    @pytest.mark.parametrize(
        "options", [{}, {"do_normalize": False}, {"size": 64, "image_mean": [0.1, 0.2, 0.3]}], ids=str
    )
    def test_round_trip(self, options, tmp_path) -> None:
        processor = OmniImageProcessor(**options)
        processor.save_pretrained(tmp_path)
        again = OmniImageProcessor.from_pretrained(tmp_path)
        assert again.to_json_string() == processor.to_json_string()
        found, before = (p(picture(), return_tensors="pt")["pixel_values"] for p in (again, processor))
        assert torch.equal(found, before)
        written = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert written["image_processor_type"] == "OmniImageProcessor"

    def test_settings_are_not_shared(self) -> None:
        one = OmniImageProcessor()
        one.size["height"] = 1
        assert OmniImageProcessor().size["height"] == 224
