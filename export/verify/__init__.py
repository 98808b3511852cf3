"""The self-check of an export: a comparison of the written graphs in ONNX Runtime with PyTorch."""
