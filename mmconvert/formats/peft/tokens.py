"""Trained rows of an embedding: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.errors import CheckpointError
from mmconvert.narrow import is_array, is_object

# Ends the name of the new rows, behind that of the embedding.
TOKENS = ".token_adapter.trainable_tokens_delta"


def token_numbers(config: Mapping[str, object], where: str, module: str) -> tuple[int, ...]:
    """The trained rows by the configuration: one list, or one for each module.

    Raises:
        CheckpointError: none, or no numbers.
    """
    said = config.get("trainable_token_indices")
    if is_object(said):
        said = next((said[end] for end in said if f".{module}".endswith(f".{end}")), None)
    numbers = [n for n in said if isinstance(n, int)] if is_array(said) else []
    if not is_array(said) or len(numbers) != len(said):
        raise CheckpointError(
            f"{where}: trainable_token_indices does not tell the trained rows of {module}",
            "a list of token numbers, or one for each module",
            "copy adapter_config.json again",
        )
    return tuple(numbers)
