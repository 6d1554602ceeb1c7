"""The verbs: spellings of a conversion, one function for each, in a module for each format beside
Hugging Face's. What they are asked are classes of ``config``, in modules of the same names.
"""

from __future__ import annotations

from typing import Any

from mmconvert.request import End, Request

SOURCE, TARGET = "--cfg.source_parallel_config.", "--cfg.target_parallel_config."


def between(command: str, cfg: Any) -> Request:  # noqa: ANN401 - made of the formats' flags
    """The request of a verb such as hf_to_npy, between any two formats."""
    first, _, second = command.partition("_to_")
    return Request(
        command,
        End(first, cfg.source, cfg.source_layout, "--cfg.source_layout."),
        End(second, cfg.target, cfg.target_layout, "--cfg.target_layout."),
        original=cfg.hf_config.hf_dir,
        cfg=cfg,
    )
