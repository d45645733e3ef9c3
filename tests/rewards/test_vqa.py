"""The probability of a yes, against a small LLaVA fed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from rlr_ray.rewards.images import CLIP_MEAN, CLIP_STD, pictures
from tests.rewards.tiny import SIZE

WORDS = ["<pad>", "<unk>", "<image>", "ask", ":", "say", "Yes", "no", "does", "it", "show", "a", "cat", "dog", "?"]
TEMPLATE = (
    "{% for turn in messages %}ask : {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} say :{% endif %}"
)
QUESTION = "does it show {prompt} ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": ["<image>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=8),
        text_config=LlamaConfig(**sizes, vocab_size=len(WORDS), num_key_value_heads=2),
        image_token_id=2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def test_it_is_the_probability_of_the_answers_token(folder: Path) -> None:
    reward: Any = load_reward("vqa", {"path": str(folder), "question": QUESTION}, torch.device("cpu"))
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    prompts, model = ["a cat", "a dog", "a cat"], LlavaForConditionalGeneration.from_pretrained(folder).eval()
    expected = []
    for picture, prompt in zip(pictures(images), prompts, strict=True):
        pixels = (np.asarray(picture) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        said = ["ask", ":", *["<image>"] * (SIZE // 8) ** 2, "does", "it", "show", *prompt.split(), "?", "say", ":"]
        tokens = torch.tensor([[WORDS.index(word) for word in said]])
        with torch.no_grad():
            values = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            logits = model(input_ids=tokens, pixel_values=values).logits[0, -1].double()
        expected.append(float((logits - logits.logsumexp(0)).exp()[WORDS.index("Yes")]))
    scores = reward(images, prompts, [{}] * 3)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert len({round(one, 6) for one in expected}) == 3
    other: Any = load_reward("vqa", {"path": str(folder), "question": QUESTION, "answer": "no"}, torch.device("cpu"))
    assert not torch.allclose(other(images, prompts, [{}] * 3), scores)


def test_a_question_without_the_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"options\.question is 'a cat\?'; allowed: a text with \{prompt\} in it"):
        load_reward("vqa", {"path": str(folder), "question": "a cat?"}, torch.device("cpu"))
