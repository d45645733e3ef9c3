"""Whether a picture shows the text that its prompt quotes: what RapidOCR reads there. A black box.

The score of Flow-GRPO's text rendering (Liu et al. 2025, arXiv:2505.05470): max(1 - d / n, 0), d the edit distance of
what is read from the n letters that are wanted, spaces left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.images import pictures

# Straight single quotes are apostrophes inside a word
_STRAIGHT = r"\"([^\"]+)\"|(?<!\w)'([^']+)'(?!\w)"
_QUOTED = re.compile(_STRAIGHT + r"|“([^”]+)”|「([^」]+)」|『([^』]+)』|«([^»]+)»|\u2018([^\u2019]+)\u2019")


class Ocr:
    """1 for a picture in which all of the text can be read and no other, 0 at worst. Chinese, English and digits.

    The text is metadata's `column` if a prompt has it, else what stands in quotes in the prompt. `case`: letters count
    in the case in which they are written. `side`: pixels that the shorter side has at least where text is looked for;
    fewer are faster.
    """

    def __init__(self, column: str = "text", case: bool = False, side: int = 736):
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(
                f"reward 'ocr' needs RapidOCR ({error}); install it: pip install 'rlr-ray[ocr]'; its networks "
                "(PP-OCRv6, Apache-2.0) come with it"
            ) from error
        self.column, self.case = column, case
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.engine = RapidOCR(params={"Global.log_level": "critical", "Det.limit_side_len": side} | threads)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        wanted = [self._wanted(*asked) for asked in zip(prompts, metadata, strict=True)]
        read = [self._read(np.asarray(picture)[:, :, ::-1]) for picture in pictures(images)]  # BGR, as OpenCV has it
        return torch.tensor([agreement(*texts) for texts in zip(read, wanted, strict=True)])

    def _read(self, picture: np.ndarray[Any, Any]) -> str:
        return self._plain("".join(self.engine(picture).txts or ()))

    def _wanted(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        text = metadata.get(self.column)
        quoted = ["".join(groups) for groups in _QUOTED.findall(prompt)] if text in (None, "") else [str(text)]
        plain = self._plain("".join(quoted))
        if not plain:
            raise UserError(
                f"reward 'ocr': prompt {prompt!r} quotes no text and has no metadata {self.column!r}; allowed: a text "
                f'in quotes, e.g. a sign that reads "OPEN", or a column {self.column!r} in the prompts file'
            )
        return plain

    def _plain(self, text: str) -> str:
        """Without spaces, in one width, and in one case unless it counts."""
        text = "".join(unicodedata.normalize("NFKC", text).split())
        return text if self.case else text.casefold()


def agreement(read: str, wanted: str) -> float:
    return max(1 - edit_distance(read, wanted) / len(wanted), 0.0)


def edit_distance(one: str, other: str) -> int:
    """Letters put in, taken out or exchanged (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, there in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != there))
    return row[-1]
