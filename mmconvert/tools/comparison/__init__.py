"""Two checkpoints side by side: opened alike, proven equal or measured apart."""
