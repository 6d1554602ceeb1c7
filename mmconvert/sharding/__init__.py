"""Parallel layouts in integers: stage grids, ranks, fuse and shard maps."""
