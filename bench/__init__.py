"""What a model costs. `flops` counts work by formula: `from visprune.bench import flops`."""
