"""The executor: runs plans, to copy, to compare, to measure and to digest. No formats, no names."""
