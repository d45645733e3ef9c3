from __future__ import annotations

from pathlib import Path

import pytest

from rlr_ray.errors import UserError
from rlr_ray.prompts import Prompt, load_prompts, prompt_order


def test_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dög \n", "utf-8")
    assert load_prompts(str(file)) == [Prompt("a cat"), Prompt("a dög")]


def test_json_lines_hand_every_other_key_to_the_reward(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "count": 2}\n{"prompt": "a dog"}\n', "utf-8")
    assert load_prompts(str(file)) == [Prompt("a cat", {"count": 2}), Prompt("a dog")]


def test_every_prompt_is_used_once_before_any_is_used_again() -> None:
    orders = [[prompt_order(5, slot, 0, "train") for slot in range(first, first + 5)] for first in (0, 5, 10)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert orders[0] != orders[1] or orders[1] != orders[2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt", "not found"]),
        ("empty.txt", b"\n \n", ["empty.txt", "no prompt"]),
        ("latin.txt", b"caf\xe9\n", ["latin.txt", "UTF-8", "byte 3"]),
        ("table.csv", b"prompt\na cat\n", ["table.csv", ".csv", ".txt, .jsonl"]),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', ["broken.jsonl:2", "JSON"]),
        ("nameless.jsonl", b'{"text": "a"}\n', ["nameless.jsonl:1", "prompt"]),
    ],
)
def test_a_bad_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(str(file))
    assert all(word in str(error.value) for word in words)
