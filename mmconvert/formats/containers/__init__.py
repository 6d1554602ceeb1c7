"""Kinds of files: bytes and offsets, no knowledge of models."""
