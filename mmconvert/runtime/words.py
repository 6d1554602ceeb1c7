"""A tokenizer, and what of it fits the model."""

# Some functions of transformers have no types, or types that are open.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import transformers

from mmconvert.errors import RequestError
from mmconvert.runtime.families import Architecture


class Words:
    """The tokenizer of a model.

    Args:
        hf_dir: has its files.

    Raises:
        RequestError: there is none that transformers can load.
    """

    def __init__(self, arch: Architecture, hf_dir: Path) -> None:
        self.arch = arch
        self._alone = threading.Lock()
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                hf_dir, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a broken tokenizer makes of itself
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"{hf_dir} has no tokenizer that transformers can load: {reason}",
                "the tokenizer files of the model",
            ) from None

    def special(self, word: str) -> int:
        """The id of a special token.

        Raises:
            RequestError: the tokenizer has none, or the model no such id.
        """
        found = self.tokenizer.convert_tokens_to_ids(word)
        vocab = self.arch.text_config.vocab_size
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id or found >= vocab:
            raise RequestError(
                f"the tokenizer has no {word} below the model's {vocab} ids",
                "the tokenizer of this model, with the tokens of its conversations",
            )
        return found

    def ids(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            RequestError: it is no text, has a placeholder in it, or an id that the model has not.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{ascii(text)[:60]} is not valid text: it has half of a surrogate pair",
                "Unicode text",
            ) from None
        with self._alone:  # tokenizers have one state for all threads
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = max(ids, default=0)
        if most >= self.arch.text_config.vocab_size:
            raise RequestError(
                f"the tokenizer gives id {most}, the model has {self.arch.text_config.vocab_size}",
                "the tokenizer of this model",
            )
        if self.arch.places & set(ids):
            raise RequestError(
                f"a text holds a placeholder of the tokenizer: {text[:60]!r}",
                "<image>, <video> or <audio> where a file belongs",
            )
        return list(ids)
