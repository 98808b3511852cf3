"""What an export writes: the PyTorch modules of each graph, their trace, and the ONNX files."""
