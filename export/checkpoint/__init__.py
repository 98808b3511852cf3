"""Reading a checkpoint: configuration, weights, tokenizer, image processor and chat template."""
