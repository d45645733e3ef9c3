"""What held-out pictures are compared by and with, and what of it a run tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rlr_ray.cli import main
from rlr_ray.errors import UserError
from rlr_ray.loggers.warnings import _pictures
from rlr_ray.rewards.digits import DigitsJudge, real_digits
from rlr_ray.rewards.likeness import Pictures, Reference, summarised
from rlr_ray.rewards.mixture import View, reward_here
from rlr_ray.rewards.scores import Scores
from rlr_ray.train.engine import Engine
from rlr_ray.train.held_out import evaluate
from rlr_ray.train.reference import _of_reward, _pixels, picture_features, real_reference
from tests.runs import small_run, train_here

THREE, EIGHT = "a handwritten three", "a handwritten eight"  # the prompts of these runs


def engine(folder: Path, **evaluation: Any) -> Engine:
    return Engine(small_run(folder, evaluation={"judge": {"name": "digits_judge"}, **evaluation}))


def test_the_first_judges_features_then_a_rewards_then_pixels(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    name, features_of = picture_features(engine(tmp_path))
    assert name == "digits_judge"
    layers = DigitsJudge().classifier.layers
    torch.testing.assert_close(layers[-1](features_of(images)), DigitsJudge().classifier(images))
    assert picture_features(engine(tmp_path, judge=None))[0] == "digits"
    bare = engine(tmp_path)
    for mixture in (bare.judges, bare.rewards):
        for label in mixture.labels:
            mixture.rewards[label] = Bare()
    name, features_of = picture_features(bare)
    assert name == "pixels"
    one, other = features_of(images)
    assert float((one - other).norm()) == pytest.approx(float((images[0] - images[1]).square().mean().sqrt()))


class Bare(nn.Module):
    """A network that has a part of that name, but no such method."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return images.mean((1, 2, 3))


def test_a_videos_frames_stand_one_after_the_other_and_features_are_checked() -> None:
    videos = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    two = _of_reward("judge", _pixels, View((1, 3), together=False), videos)
    distance = (videos[0] - videos[1])[[1, 3]].square().mean().sqrt()
    assert float((two[0] - two[1]).norm()) == pytest.approx(float(distance))
    whole = _of_reward("judge", lambda seen: seen.flatten(1), View((0, 1, 2, 3), together=True), videos)
    torch.testing.assert_close(whole, videos.flatten(1))
    with pytest.raises(
        UserError, match=r"'judge': its features.* shape \[2, 3, 16, 16\] for 2 pictures; allowed: \[2, D\]"
    ):
        _of_reward("judge", lambda images: images, View((), together=False), videos[:, 0])


def test_the_shipped_digits_are_those_that_the_prompts_name(tmp_path: Path) -> None:
    images, labels = real_digits()
    assert images.shape == (360, 3, 16, 16) and labels.bincount().tolist() == [28, 37, 30, 36, 39, 38, 34, 42, 38, 38]
    judge = reward_here("judge", engine(tmp_path).config.evaluation.judges["digits_judge"], torch.device("cpu"))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    read = judge(images, [f"a handwritten {words[label]}" for label in labels.tolist()], [{}] * 360)
    assert float(read.mean()) > 0.98
    real = real_reference(engine(tmp_path, reference="digits"))
    assert (
        real is not None
        and real.by_prompt
        and real.pictures.prompts.tolist() == [0 if label == 3 else 1 for label in labels.tolist() if label in (3, 8)]
    )
    expected = DigitsJudge().classifier.features(images[(labels == 3) | (labels == 8)])
    torch.testing.assert_close(real.pictures.features, expected)
    twice = Engine(small_run(tmp_path, prompts=[THREE, "three", EIGHT], evaluation={"reference": "digits"}))
    of_both = real_reference(twice)
    assert of_both is not None and not of_both.by_prompt and len(of_both.pictures.features) == len(expected)


def folder_of(place: Path, **counts: int) -> Path:
    """Grey pictures twice as wide as high, in folders by name, or in the folder itself; white where they are cut."""
    for name, count in counts.items():
        inside = place if name == "here" else place / name.replace("_", " ")
        inside.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = numpy.full((32, 64, 3), 20 * number, numpy.uint8)
            pixels[:, :12] = pixels[:, 52:] = 255  # what lies beside the middle square
            Image.fromarray(pixels).save(inside / f"{number}.png")
    return place


def test_a_folder_is_read_by_prompt_or_as_a_whole(tmp_path: Path) -> None:
    flat = real_reference(engine(tmp_path, judge=None, reference=str(folder_of(tmp_path / "flat", here=5))))
    assert flat is not None and not flat.by_prompt and len(flat.pictures.features) == 5
    # 5 grey pictures of 16 x 16, cut about the middle: what the reward's own features say of these
    greys = torch.arange(5).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) * 20 / 255
    own = picture_features(engine(tmp_path, judge=None))[1](greys)
    torch.testing.assert_close(flat.pictures.features, own, rtol=1e-3, atol=1e-3)
    by_name = folder_of(tmp_path / "named", A_Handwritten_EIGHT=4, a_cat=9)
    real = real_reference(engine(tmp_path, reference=str(by_name)))
    assert real is not None and real.by_prompt and real.pictures.prompts.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "is no folder here; allowed: digits, or a folder of pictures"),
        ({"here": 3}, "has 3 pictures; allowed: 4 or more"),
        ({"a_cat": 9}, r"\(a-cat\) none is named like a held-out prompt .* allowed: names like 'a handwritten three'"),
        ({"here": 4, "broken": 0}, "cannot be read as a picture"),
    ],
)
def test_what_cannot_be_compared_with_is_refused_before_anything_is_sampled(
    tmp_path: Path, counts: dict[str, int], words: str
) -> None:
    place = folder_of(tmp_path / "pictures", **{name: count for name, count in counts.items() if count})
    if "broken" in counts:
        (place / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=words):
        train_here(small_run(tmp_path, evaluation={"reference": str(place)}))
    assert not (tmp_path / "short" / "samples" / "before.pt").exists()


def test_pictures_are_no_reference_of_videos(tmp_path: Path) -> None:
    drawn = engine(tmp_path, reference="digits")
    drawn.model.frames = 8
    with pytest.raises(UserError, match="but the model draws videos; allowed: nothing; leave it out"):
        real_reference(drawn)


COMPARED = {"chains": 24, "chunk_size": 24, "every": 2, "judge": {"name": "digits_judge"}, "reference": "digits"}
MEASURES = ("precision", "recall", "nn", "pairwise")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run that was evaluated at its start, half-way and at its end."""
    folder = tmp_path_factory.mktemp("compared")
    keys: dict[str, Any] = {"model": {"name": "digits"}, "train": {"learning_rate": 0.2}}
    return train_here(small_run(folder, evaluation=COMPARED, **keys), shown=True).path


def test_a_run_tells_how_like_its_pictures_are(run_folder: Path) -> None:
    """Columns, summary, report: of the evaluation half-way and of the last one, each computed anew."""
    summary = json.loads((run_folder / "summary.json").read_text())
    keys: dict[str, Any] = {"model": {"name": "digits"}, "train": {"learning_rate": 0.2}}
    again = Engine(small_run(run_folder.parent, evaluation=COMPARED, **keys))
    before, real = evaluate(again, again.model.initial_theta), real_reference(again)
    after = evaluate(again, again.model.load_adapter(run_folder))
    assert real is not None and summary["compared_by"] == "digits_judge"
    for name, reference in (("base", Reference.base(before.pictures)), ("real", real)):
        expected = (reference.of(before.pictures).means, reference.of(after.pictures).means)
        told = summary["likeness"][name]
        assert list(told) == list(MEASURES)
        for measure in MEASURES:
            was, is_now = (one[measure] for one in expected)
            assert told[measure]["before"] == pytest.approx(was, rel=1e-4)
            assert told[measure]["after"] == pytest.approx(is_now, rel=1e-4)
            assert told[measure]["change"] == pytest.approx(is_now - was, abs=1e-4)
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    columns = {*MEASURES, *(f"real_{name}" for name in MEASURES)}
    assert [columns <= set(row) for row in rows] == [False, True, False, False]
    report = (run_folder / "report.html").read_text()
    assert "recall, against real pictures" in report and "Compared by the features of digits_judge" in report
    assert "Precision and recall, against the base model" in report


def test_evaluate_tells_the_same(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run_folder.parent / "own"
    assert main(["evaluate", str(run_folder), "--seed", "0", "--out", str(place)]) == 0
    summary = json.loads((run_folder / "summary.json").read_text())
    told = json.loads((place / "evaluate.json").read_text())
    assert told["compared_by"] == "digits_judge"
    for reference, measures in summary["likeness"].items():
        for name, one in measures.items():
            assert told["runs"][0]["likeness"][reference][name] == pytest.approx(one, rel=1e-4, abs=1e-4)
    assert "real pictures" in capsys.readouterr().out


def test_a_resumed_run_may_be_compared_with_other_pictures(run_folder: Path) -> None:
    keys: dict[str, Any] = {"model": {"name": "digits"}, "train": {"learning_rate": 0.2, "iterations": 5}}
    evaluation = {**COMPARED, "judge": None, "reference": str(folder_of(run_folder.parent / "grey", here=9))}
    summary = train_here(small_run(run_folder.parent, evaluation=evaluation, **keys), resume=True).load_summary()
    assert summary["compared_by"] == "digits" and summary["likeness"]["real"]["recall"]["before"] < 0.2  # all dark
    assert "pairwise" not in summary["likeness"]["real"]  # they have no prompts


def test_pictures_of_one_model_on_other_seeds_give_no_warning(tmp_path: Path) -> None:
    rose = Scores(torch.zeros(60), torch.ones(60) + torch.linspace(-1, 1, 60), trained=True)
    told: list[Pictures] = []
    for seed in (1, 2):
        keys: dict[str, Any] = {"model": {"name": "digits"}}
        evaluation = {"chains": 60, "chunk_size": 60, "seed": seed, "judge": {"name": "digits_judge"}}
        sampled = Engine(small_run(tmp_path, evaluation=evaluation, **keys))
        told.append(evaluate(sampled, sampled.model.initial_theta).pictures)
    for one, other in (told, told[::-1]):  # what rises one way falls the other way
        reference = Reference.base(one)
        same = summarised({"base": reference.of(one)}, {"base": reference.of(other)})
        assert _pictures({"likeness": same}, rose) == []
    reference = Reference.base(told[0])
    poor = Pictures(told[1].features[:1] + 0.1 * told[1].features, told[1].prompts)
    less = summarised({"base": reference.of(told[0])}, {"base": reference.of(poor)})
    words = _pictures({"likeness": less}, rose)
    assert len(words) == 1 and "while likeness to the base model's pictures fell: " in words[0]
    assert "recall from " in words[0] and "distance within a prompt from 1.00 to 0.1" in words[0]
    assert _pictures({"likeness": less}, Scores(rose.after, rose.before, trained=True)) == []
