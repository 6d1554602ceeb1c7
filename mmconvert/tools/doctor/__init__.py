"""What is wrong with a checkpoint, all of it, and how to mend it. Start at ``examine``."""
