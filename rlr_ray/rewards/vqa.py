"""How likely a vision-language model answers yes when it is asked whether a picture shows its prompt. A black box.

VQAScore (Lin et al. 2024, arXiv:2404.01291): P("Yes" | picture, question), with any such model of transformers in place
of its CLIP-FlanT5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.errors import UserError
from rlr_ray.rewards.hub import Source
from rlr_ray.rewards.images import pictures


class Vqa(nn.Module):
    """`path`: a model of transformers' image-text-to-text classes with its processor and chat template.

    `question`: in which {prompt} stands. `answer`: its first token's probability is the score. `dtype`: of the weights.
    """

    def __init__(
        self,
        path: str,
        question: str = 'Does this figure show "{prompt}"? Please answer yes or no.',
        answer: str = "Yes",
        dtype: str = "auto",
    ):
        super().__init__()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if "{prompt}" not in question:
            raise UserError(f"reward 'vqa': options.question is {question!r}; allowed: a text with {{prompt}} in it")
        source = Source("vqa", "path", path, path, ["config.json", "tokenizer_config.json", "*.safetensors or *.bin"])
        place = source.folder or path
        with source.explained():
            self.model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype).requires_grad_(False).eval()
            self.processor = AutoProcessor.from_pretrained(place)
        self.question = question
        self.answer: int = self.processor.tokenizer(answer, add_special_tokens=False).input_ids[0]

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """One picture at a time: models pad the text of several in ways of their own."""
        return torch.tensor([self._said(*asked) for asked in zip(pictures(images), prompts, strict=True)])

    def _said(self, picture: Any, prompt: str) -> float:
        asked = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        turn = {"role": "user", "content": [{"type": "image"}, asked]}
        text = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = self.processor(images=picture, text=text, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return float(self.model(**inputs).logits[0, -1].float().softmax(-1)[self.answer])
