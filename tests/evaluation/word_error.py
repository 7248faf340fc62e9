"""The word error of answers that `omni evaluate --answers` wrote, by kind: words changed, added or left out, for each word.

python tests/evaluation/word_error.py heard.jsonl
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from omni.training.transcription import edits


def word_errors(path: Path) -> dict[str, tuple[float, int]]:
    """For each kind the word error, and the number of words that were said."""
    wrong, said = defaultdict[str, int](int), defaultdict[str, int](int)
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        words = row["expected"].split()
        said[row["kind"]] += len(words)
        wrong[row["kind"]] += edits(words, row["answer"].split())
    return {kind: (wrong[kind] / said[kind], said[kind]) for kind in said}


if __name__ == "__main__":
    for kind, (error, words) in word_errors(Path(sys.argv[1])).items():
        sys.stdout.write(f"{kind:12} {error:.3f} of {words:,} words\n")
