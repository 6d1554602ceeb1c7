"""mmconvert: multimodal checkpoints between Hugging Face and MM format, in any parallel layout."""

from __future__ import annotations

from mmconvert.version import VERSION as __version__

__all__ = ["__version__"]
