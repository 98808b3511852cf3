"""Making the graphs of a bundle: their PyTorch modules, the tracing, and the ONNX files."""
