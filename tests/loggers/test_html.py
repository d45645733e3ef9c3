"""report.html against what was measured."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.figures import cost_figures, distance_figures, reward_figures, term_figures
from rlr_ray.loggers.html import write_report
from rlr_ray.loggers.pictures import save_columns, save_comparison
from rlr_ray.loggers.shown import Shown, pairs_of
from rlr_ray.loggers.warnings import warnings
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.rewards.scores import Evaluation, Scores, held_out_scores
from tests.runs import short_run

CHAINS, PICTURES = 8, 3
SPREAD = torch.linspace(-0.01, 0.01, CHAINS)  # of differences, so that their standard error is about .003


class Read(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self.open = list[tuple[str, dict[str, str | None]]](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        if self.open not in ("script", "style"):
            self.texts.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        self.open = ""


def evaluation(seed: int, rewards: float, judge: float | None, size: int = 16) -> Evaluation:
    """With these means; two of them differ by SPREAD times the difference of their seeds."""
    base = torch.arange(CHAINS) / 7
    images = torch.rand(PICTURES, 3, size, size, generator=torch.Generator().manual_seed(seed))
    scores = {"digits": base + rewards + seed * SPREAD}
    scores |= {} if judge is None else {"digits_judge": base + judge + seed * SPREAD}
    return Evaluation(scores, images, torch.zeros(3, 2), torch.zeros(CHAINS, 2), torch.zeros(CHAINS))


TOTAL = WeightedSum(("digits",), (1.0,), ((0.0, 1.0),))


def scores_of(before: Evaluation, after: Evaluation) -> dict[str, Scores]:
    return held_out_scores(TOTAL, before, after)


BEFORE = evaluation(0, 0.0, 0.5)


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    known = {"reward_mean": [0.1, 0.4, 0.6], "reward_std": [0.2, 0.1, 0.3], "seconds": [2.0, 3.0, 4.0]}
    columns = known | columns
    return [
        {"step": step} | {name: values[step] for name, values in columns.items() if values[step] is not None}
        for step in range(3)
    ]


def summary(**keys: Any) -> dict[str, Any]:
    known = {
        "noise_shares": {"half_order": 0.3, "zeroth_order": 0.3},
        "warnings": [],
        "likeness": {},
        "steps": 3,
        "ran_on": "toaster",
    }
    known |= {"denoiser_forwards": 7, "denoiser_backwards": 5, "seconds": 9.0, "peak_memory_gib": 0.5}
    known |= {"kl_by_step": [0.2, 0.5, 0.0], "steps_off": [2], "clipped": {"first_order": 0.7, "zeroth_order": 0.25}}
    return known | {"adapter": "lora/a", "trained_numbers": 12, "versions": {"torch": "2"}} | keys


def written(
    folder: Path, after: Evaluation, prompts: Sequence[str] = "abc", before: Evaluation = BEFORE, **keys: Any
) -> tuple[Read, str]:
    """The report of a run with these keys of its summary; without those that are None."""
    told = {name: value for name, value in summary(**keys).items() if value is not None}
    file, scores = folder / "report.html", scores_of(before, after)
    write_report(file, short_run(folder), rows(), Shown(told, scores, pairs_of(before, after, prompts)))
    text = file.read_text("utf-8")
    return Read(text), text


def pictures(read: Read) -> list[Image.Image]:
    sources = [attributes["src"] or "" for tag, attributes in read.tags if tag == "img"]
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def test_videos_move_in_the_grid(tmp_path: Path) -> None:
    greys = torch.linspace(0, 1, PICTURES * 4).view(PICTURES, 4)
    still = evaluation(1, 1.0, 0.6)
    for side in (16, 200):  # as GIF, as WebP
        moving = replace(still, images=greys[..., None, None, None].expand(PICTURES, 4, 3, side, side))
        read, _ = written(tmp_path, moving, ["one", "two", "three"], replace(BEFORE, images=moving.images.flip(1)))
        shown = pictures(read)
        assert len(shown) == 2 * PICTURES and {picture.n_frames for picture in shown} == {4}
        for i, picture in enumerate(shown):
            for frame, grey in enumerate(greys[i // 2].tolist() if i % 2 else greys[i // 2].flip(0).tolist()):
                picture.seek(frame)
                assert numpy.asarray(picture.convert("L")).mean() / 255 == pytest.approx(grey, abs=0.02)


def test_the_grid_shows_the_evaluations_images_and_scores(tmp_path: Path) -> None:
    after = evaluation(1, 1.0, 0.6)
    read, _ = written(tmp_path, after, ["one", "two", "three"])
    for i, picture in enumerate(pictures(read)):
        image = (BEFORE, after)[i % 2].images[i // 2]
        assert abs(numpy.asarray(picture) / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert len(pictures(read)) == 2 * PICTURES
    shown = read.texts[read.texts.index("one") :]
    for i, prompt in enumerate(("one", "two", "three")):
        place = shown.index(prompt)
        assert [text for text in shown[place + 1 :] if text][:6] == [
            "before",
            f"reward {BEFORE.scores['digits'][i]:.4g}",
            f"digits_judge {BEFORE.scores['digits_judge'][i]:.4g}",
            "after",
            f"reward {after.scores['digits'][i]:.4g}",
            f"digits_judge {after.scores['digits_judge'][i]:.4g}",
        ]


def test_the_head_says_what_was_clipped(tmp_path: Path) -> None:
    said = " ".join(written(tmp_path, BEFORE)[0].texts)
    assert "70% of first order's chains and 25% of zeroth order's pairs (median over updates)" in said
    assert "clipped" not in " ".join(written(tmp_path, BEFORE, clipped={})[0].texts)


def test_a_large_image_is_shown_to_within_what_jpeg_loses(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 1, 300).expand(PICTURES, 3, 300, 300)
    large = replace(BEFORE, images=ramp)
    read, _ = written(tmp_path, large, before=large)
    for picture in pictures(read):
        assert picture.format == "JPEG"
        assert abs(numpy.asarray(picture) / 255 - ramp[0].permute(1, 2, 0).numpy()).max() < 0.03


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    read, _ = written(tmp_path, BEFORE)
    links = [attributes.get(name) for _, attributes in read.tags for name in ("src", "href", "srcset", "data")]
    assert {link.split(":")[0] for link in links if link is not None} == {"data"}
    assert "link" not in {tag for tag, _ in read.tags}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in read.tags


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script><img src=http://x>"
    read, text = written(tmp_path, BEFORE, [bad, "b", "c"], warnings=[bad], ran_on=bad)
    assert "alert('x')" not in text
    assert read.texts.count(bad) == 2  # the caption and the warning
    assert f"on {bad}." in " ".join(read.texts)
    assert len(pictures(read)) == 2 * PICTURES


def test_a_report_of_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    going = written(tmp_path, BEFORE, ran_on=None, adapter=None, versions=None)[0]
    assert "Still running: update 3 of 4" in " ".join(going.texts)
    assert "Still running" not in " ".join(written(tmp_path, BEFORE)[0].texts)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return short_run(tmp_path)


GOOD = evaluation(1, 1.0, 0.5)


def test_a_good_run_is_warned_of_nothing(config: RunConfig) -> None:
    counts = {name: [0, 0, 0] for name in ("reward_invalid", "rollouts_missing", "rollouts_rerun")}
    assert warnings(config, rows(**counts), summary(), scores_of(BEFORE, GOOD)) == []


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (evaluation(1, 1.0, 0.3), ["rose by 1 while judge digits_judge fell by 0.2 ± 0.0025: it may be gamed"]),
        (evaluation(1, 1.0, 0.499), []),  # fell by less than two standard errors
        (evaluation(1, -1.0, 0.3), ["the held-out reward fell by 1 ± 0.0025; lower train.learning_rate"]),
        (evaluation(1, 0.001, 0.3), ["the gain, 0.001 ± 0.0025, is within 2 standard errors of none"]),
    ],
)
def test_warnings_of_held_out_scores(config: RunConfig, after: Evaluation, words: list[str]) -> None:
    found = warnings(config, rows(), summary(), scores_of(BEFORE, after))
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True)), found


@pytest.mark.parametrize(
    ("columns", "keys", "words"),
    [
        ({"reward_invalid": [0, 2, None]}, {}, "2 images had a score that was not finite"),
        ({"rollouts_missing": [None, 3, 4]}, {}, "7 perturbation pairs were not waited for"),
        ({"rollouts_rerun": [1, 0, 0]}, {}, "1 rollouts ran again"),
        ({}, {"stopped": "KL reached 3 nats"}, "stopped early: KL reached 3 nats"),
        (
            {},
            {"noise_shares": {"first_order": 0.1, "half_order": 0.2, "zeroth_order": 0.65}},
            "variance is high: 85% of the squared gradient was noise, 65% from zeroth order",
        ),
    ],
)
def test_warnings_of_a_runs_numbers(
    config: RunConfig, columns: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    (found,) = warnings(config, rows(**columns), summary(**keys), scores_of(BEFORE, GOOD))
    assert words in found


def test_a_plan_that_drops_steps_is_warned_of(tmp_path: Path) -> None:
    config = short_run(tmp_path, estimator={"preset": "alignprop", "rest": "none"})
    (found,) = warnings(config, rows(), summary(), scores_of(BEFORE, GOOD))
    assert found == "biased: the gradient through the steps that nothing owns is dropped"


def test_reward_figures_draw_what_was_measured(config: RunConfig) -> None:
    columns = {
        "held_out_reward": [None, 0.9, None],
        "held_out_reward_se": [None, 0.05, None],
        "reward_my:a.b_mean": [1.0, 2.0, 3.0],
        "held_out_my:a.b": [None, 7.0, None],
        "held_out_my:a.b_se": [None, 0.5, None],
    }
    figures = reward_figures(rows(**columns), scores_of(BEFORE, GOOD), 3)
    assert list(figures) == ["Reward", "my:a.b", "digits_judge (judge)"]
    low, high, mean, points = figures["Reward"].data
    assert list(mean.x) == [1, 2, 3] and list(mean.y) == [0.1, 0.4, 0.6]
    assert list(low.y) == pytest.approx([-0.1, 0.3, 0.3]) and list(high.y) == pytest.approx([0.3, 0.5, 0.9])
    assert dict(zip(points.x, points.y, strict=True)) == pytest.approx({0: 0.5, 2: 0.9, 3: 1.5})
    error = float(BEFORE.scores["digits"].std()) / CHAINS**0.5
    assert dict(zip(points.x, points.error_y.array, strict=True))[0] == pytest.approx(error)
    mean, points = figures["my:a.b"].data
    assert list(mean.y) == [1, 2, 3] and (list(points.x), list(points.y)) == ([2], [7])
    assert list(points.error_y.array) == [0.5]


def test_term_figures_know_every_term_and_leave_out_what_is_not_there() -> None:
    columns = {f"{name}_norm": [1.0, 2.0, 3.0] for name in ("kl", "half_order", "first_order", "gradient")}
    columns |= {"half_order_weight": [0.5] * 3, "half_order_variance": [-1.0, 1.0, None]}
    columns |= {"cosine_first_order_half_order": [0.1, 0.2, 0.3]}
    figures = term_figures(rows(**columns))
    assert list(figures) == ["Norm, before weighting", "Weight", "Variance", "Cosine between terms"]
    norms = figures["Norm, before weighting"]
    assert [trace.name for trace in norms.data] == ["first order", "half order", "kl", "the sum, as applied"]
    assert norms.layout.yaxis.type == "log" and figures["Variance"].layout.yaxis.type is None
    assert [trace.name for trace in figures["Cosine between terms"].data] == ["first order, half order"]


def test_kl_diversity_and_cost_are_drawn_where_measured() -> None:
    assert distance_figures(rows(), [None, 0.0]) == {}
    (bars,) = distance_figures(rows(), [0.1, None, 0.4])["KL by step of the chain, at the end"].data
    assert (list(bars.x), list(bars.y)) == ([0, 2], [0.1, 0.4])
    assert list(cost_figures(rows())) == ["Seconds an update"]
    kl = distance_figures(rows(kl=[None, 0.5, 0.7], kl_se=[None, 0.1, 0.2]), [])["KL to the base model, nats a chain"]
    low, high, mean = kl.data
    assert [list(trace.x) for trace in kl.data] == [[2, 3]] * 3 and list(mean.y) == [0.5, 0.7]
    assert list(low.y) == pytest.approx([0.4, 0.5]) and list(high.y) == pytest.approx([0.6, 0.9])
    assert "Diversity of the images" in distance_figures(rows(diversity=[1.0, 0.9, 0.8]), [])
    counts = {"rollouts_missing": [0, 0, 0], "rollouts_rerun": [0, 2, 0], "peak_memory_gib": [0.1, 0.2, 0.2]}
    drawn = cost_figures(rows(**counts, rollouts_per_s=[0.0] * 3))
    assert list(drawn) == ["Seconds an update", "Rollouts missing, rerun or hedged", "Peak memory, GiB"]


def test_scores_change_by_pairs() -> None:
    change, error = Scores(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 5.0]), trained=True).change
    assert (change, error) == pytest.approx((2.0, 1.0))


def test_a_title_that_looks_like_mathematics_is_drawn(tmp_path: Path) -> None:
    images = BEFORE.images[:1]
    title = r"a^b $\frac$"
    save_comparison(tmp_path / "pair", images, images, [title], title, title)
    save_columns(tmp_path / "columns", {title: images, "run": images}, [title])
    assert all(Image.open(tmp_path / f"{name}.png").size[0] > 100 for name in ("pair", "columns"))
