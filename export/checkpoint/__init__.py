"""What an export reads: configuration, weights, tokenizer, processor and chat template of a checkpoint."""
