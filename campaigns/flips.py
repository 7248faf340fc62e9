"""Single changed bytes in checkpoints: loading refuses each with the name of its file, or changes nothing.

The checkpoints are the shipped ones, and one that holds a projector alone. The last one finds its other parts in folders of
their own, whose files are changed, too. So does smol_eyes, which is tried if its language model is there (`base.sh`). All
files of a folder are equally likely, whatever their size. The header of the weights counts as a file of its own.
"""

import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from campaigns.tally import Tally

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
BASE = "SmolLM2-135M-Instruct"
FOLDERS: tuple[str, ...] = ("omni_tiny", "vision_tiny", "vision_world", "audio_tiny", "learnt")
if (CHECKPOINTS / BASE).is_dir():
    FOLDERS += ("smol_eyes",)


def run(seed: int, count: int, seconds: float, folders: tuple[str, ...] = FOLDERS) -> Tally:
    """Change `count` bytes, or as many as fit into the time, one at a time, in copies of these checkpoints."""
    end, chance = time.monotonic() + seconds, random.Random(seed)
    tried = refused = unchanged = 0
    failures = []
    with TemporaryDirectory() as place, quiet():
        copies = {copy: make(copy) for copy in (Path(place) / folder for folder in folders)}
        wholes = {copy: everything(copy) for copy in copies}
        while tried < count and time.monotonic() < end:
            copy = chance.choice([*copies])
            file, offset = chance.choice([*_places(chance.choice(copies[copy]), chance)])
            change = chance.randrange(1, 256)
            tried += 1
            with _changed(file, offset, change):
                outcome = _try(copy, file, wholes[copy])
            refused += outcome == "refused"
            unchanged += outcome == "unchanged"
            if outcome not in ("refused", "unchanged"):
                name = file.relative_to(place)
                failures.append(f"flips, seed {seed}: byte {offset} of {name} xor {change}: {outcome}")
    return Tally(tried, refused, unchanged, tuple(failures))


def make(folder: Path) -> list[Path]:
    """Make the checkpoint that the folder's name says. Returns all folders that it is read from."""
    if folder.name == "learnt":
        return _make_learnt(folder)
    shutil.copytree(CHECKPOINTS / folder.name, folder)
    if folder.name != "smol_eyes":
        return [folder]
    shutil.copytree(CHECKPOINTS / BASE, folder.with_name(BASE))
    return [folder, folder.with_name(BASE)]


def _make_learnt(folder: Path) -> list[Path]:
    """A projector between an encoder and a small language model, which stay in folders of their own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from omni.exchange.compose import compose

    encoder, thinker = folder.with_name("encoder"), folder.with_name("language_model")
    shutil.copytree(CHECKPOINTS / "vision_tiny", encoder)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "omni_tiny")
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **shape, vocab_size=len(tokenizer), eos_token_id=1)
    ).save_pretrained(thinker)
    tokenizer.save_pretrained(thinker)
    composition = compose(encoder, thinker)
    composition.model.config.untrained = None  # it is to be loaded
    composition.save(folder, apart=True)
    return [folder, encoder, thinker]


def everything(folder: Path) -> dict[str, Any]:
    """All that the answers of a checkpoint depend on, after loading."""
    from omni.checkpoints.fingerprints import fingerprint_parts
    from omni.checkpoints.folder import model_type_of
    from omni.loading.checkpoint import load
    from omni.loading.encoder import load_encoder

    found: dict[str, Any] = {}
    if model_type_of(folder) == "omni":
        model, processor = load(folder)
        tokenizer = processor.tokenizer
        found["generation"] = model.generation_config.to_dict()
        found["tokenizer"] = tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs, processor.chat_template
        found["special tokens"] = tokenizer.special_tokens_map
    else:
        encoder = load_encoder(folder)
        model, processor = encoder.model, encoder.preprocessor
    return found | {
        "weights": fingerprint_parts(model.state_dict()),
        "configuration": model.config.to_dict(),
        "preprocessing": processor.to_dict(),
    }


def _places(folder: Path, chance: random.Random) -> Iterator[tuple[Path, int]]:
    """A byte of each file; of weights, one of the header and one of the numbers."""
    for file in sorted(folder.iterdir()):
        size, start = file.stat().st_size, 0
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                start = 8 + int.from_bytes(opened.read(8), "little")
            yield file, chance.randrange(start)
        yield file, chance.randrange(start, size)


@contextmanager
def _changed(file: Path, offset: int, change: int) -> Iterator[None]:
    """Change one byte of a file within the context."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        whole = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([whole[0] ^ change]))
    try:
        yield
    finally:
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(whole)


def _try(folder: Path, file: Path, whole: dict[str, Any]) -> str:
    """The outcome of a changed file: "refused", "unchanged", or what is wrong."""
    try:
        found = everything(folder)
    except (ValueError, OSError) as error:
        named = (re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", str(error)) for name in (file.parent.name, file.name))
        return "refused" if all(named) else f"refused without the name of the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    changed = [what for what in whole if found.get(what) != whole[what]]
    return f"loaded with different {', '.join(changed)}" if changed else "unchanged"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages of transformers within the context."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
