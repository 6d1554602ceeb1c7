"""What is done with checkpoints besides converting them."""
