"""mmconvert: multimodal checkpoints between Hugging Face and MM format, in any parallel layout."""

from __future__ import annotations

from mmconvert import version

__version__ = version.VERSION

__all__ = ["__version__"]
