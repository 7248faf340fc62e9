"""Models come in and go out: compose them, convert checkpoints of micro-Omni, export ONNX graphs."""
