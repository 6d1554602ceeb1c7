"""Opens checkpoints with a family's eyes: names normalised, every tensor claimed or named."""
