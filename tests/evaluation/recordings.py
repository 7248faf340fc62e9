"""Recordings of people, to hear what a model makes of voices that no synthesizer made. No weights are trained on them.

    python tests/evaluation/recordings.py recordings          # downloads two packages of Debian with apt-get
    omni evaluate checkpoints/omni_tiny --data recordings/said.jsonl --answers heard.jsonl
    python tests/evaluation/word_error.py heard.jsonl

| kind | what | who | licence |
|---|---|---|---|
| digits | numbers of asterisk-core-sounds-en-wav, 8 kHz | Allison Smith | CC-BY-SA-3.0 |
| letters | its letters, and those of klettres-data | she, and a contributor of KLettres | CC-BY-SA-3.0; GPL-2+ |
| phrases | its phrases of one to six words | Allison Smith | CC-BY-SA-3.0 |
"""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-wav", "klettres-data")
ASTERISK, KLETTRES = "usr/share/asterisk/sounds/en_US_f_Allison", "usr/share/klettres/en/alpha"
TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
QUESTION = "what is said"
MOST_WORDS = 6


def fetch(folder: Path) -> None:
    """Unpack the packages into a folder; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
        archive.unlink()


def rows(folder: Path) -> Iterator[dict[str, str]]:
    """A row of a manifest for each recording."""
    with gzip.open(folder / TEXTS, "rt", encoding="utf-8") as texts:
        said = dict(line.rstrip("\n").split(": ", 1) for line in texts if ": " in line and not line.startswith(";"))
    for name, text in sorted(said.items()):
        words = re.findall(r"[a-z']+", text.lower())
        place, _, rest = name.rpartition("/")
        if not (folder / ASTERISK / f"{name}.wav").is_file() or re.search(r"[\[(<0-9]", text) or not words:
            continue
        if place == "letters" and len(rest) == 1:
            yield _row(f"{ASTERISK}/{name}.wav", "letters", rest)
        elif place == "digits" and rest.isdigit():
            yield _row(f"{ASTERISK}/{name}.wav", "digits", " ".join(words))
        elif place not in ("letters", "phonetic", "digits", "silence") and len(words) <= MOST_WORDS:
            yield _row(f"{ASTERISK}/{name}.wav", "phrases", " ".join(words))
    for path in sorted((folder / KLETTRES).glob("?.ogg")):
        yield _row(f"{KLETTRES}/{path.name}", "letters", path.stem.lower())


def _row(audio: str, kind: str, answer: str) -> dict[str, str]:
    return {"audio": audio, "question": QUESTION, "answer": answer, "kind": kind}


def main(folder: str = "recordings") -> None:
    """Fetch the recordings and write their manifest."""
    place = Path(folder)
    if not (place / TEXTS).is_file():
        fetch(place)
    found = list(rows(place))
    (place / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    sys.stdout.write(f"{len(found)} recordings in {place / 'said.jsonl'}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
