"""Small checkpoints of every family, with names and layer counts of real ones. No torch."""
