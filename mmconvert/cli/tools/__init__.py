"""The tools that need no converter: one file each, with ``run(words) -> exit code``."""
