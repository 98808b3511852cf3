"""The self-check: compare what ONNX Runtime computes on the written graphs with PyTorch."""
