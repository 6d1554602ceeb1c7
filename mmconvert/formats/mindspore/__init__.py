"""MindSpore checkpoints, and the strategy files that say how they are sliced."""
