"""What comes in and goes out: models that exist already, ONNX graphs, and the checkpoints of micro-Omni."""
