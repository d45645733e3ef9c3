"""README.md of a folder with what a run trained: a model card, as the Hugging Face hub shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from rlr_ray.config.run import RunConfig
from rlr_ray.models.names import EMBEDDED, LORA_FILE
from rlr_ray.utils.environment import path_of
from rlr_ray.utils.files import replace_file

FILE, _PICTURES = "README.md", "before_after"
_FROM_PICTURES = (
    "Img2Img",
    "Image2Image",
    "ImageTo",
    "Edit",
    "Inpaint",
    "Fill",
    "Kontext",
    "VideoDiffusion",
    "Pix2Pix",
)
_THEIR_OWN = {"output_dir", "cluster", "loggers", "device", "memory_budget_gib", "save_chains"}  # of one machine


def write_card(folder: Path, samples: Path, config: RunConfig, summary: Mapping[str, Any], place: str) -> None:
    """Leave the card in the folder, with the pictures that a run left in `samples`; `place`: where it is loaded from.

    A fused pipeline (it has a model_index.json) is loaded by itself, an adapter on top of its base.
    """
    fused = (folder / "model_index.json").is_file()
    pictures = sorted(samples.glob(f"{_PICTURES}.*"))
    for file in pictures:
        shutil.copyfile(file, folder / file.name)
    body = "\n\n".join(_parts(config, summary, place, [file.name for file in pictures], fused))
    card = ModelCard(f"---\n{_data(config, summary, fused).to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)
    replace_file(folder / FILE, lambda part: part.write_text(str(card), "utf-8"))


def _data(config: RunConfig, summary: Mapping[str, Any], fused: bool) -> ModelCardData:
    kind, lora = summary["pipeline"]["class"], config.adapter.type == "LORA" and not fused
    seen = "image" if any(word in kind for word in _FROM_PICTURES) else "text"
    made = "image" if summary["pipeline"]["frames"] is None else "video"
    on_hub = config.model.path is not None and not path_of(config.model.path).exists()
    return ModelCardData(
        base_model=config.model.path if on_hub else None,
        library_name="diffusers",
        pipeline_tag=f"{seen}-to-{made}",
        tags=["diffusers", "rlr_ray", "reinforcement-learning", *(["lora"] if lora else [])],
    )


def _parts(
    config: RunConfig, summary: Mapping[str, Any], place: str, pictures: list[str], fused: bool
) -> Iterator[str]:
    base, of = config.model.path or config.model.name, "A pipeline" if fused else f"An adapter ({config.adapter.type})"
    rewards, judges = ", ".join(config.rewards), ", ".join(config.evaluation.judges)
    yield f"# {config.name}"
    yield (
        f"{of} of `{base}` ({summary['pipeline']['class']}), fine-tuned by rlr_ray to raise {rewards}"
        + (f", and judged by {judges}, which it was not trained on." if judges else ".")
    )
    yield from (f"![before and after, on the same seeds]({name})" for name in pictures)
    yield "## Held-out scores\n\n" + "\n".join(_scores(summary))
    told = _distance(summary)
    yield f"Means of {config.evaluation.chains} chains that no update used, before and after on the same seeds.{told}"
    if summary["warnings"]:
        yield "\n".join(f"- Warning: {text}" for text in summary["warnings"])
    yield "## Use it\n\n```python\n" + "\n".join(_snippet(config, summary, place, fused)) + "\n```"
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    yield (
        f"## Recipe\n\n{summary['kept_update']} of {summary['steps']} updates, {summary['denoiser_forwards']:,} "
        f"denoiser forwards, {summary['trained_numbers']:,} trained numbers, on {summary['ran_on']} ({versions})."
    )
    recipe = config.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=_THEIR_OWN)
    yield f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"


def _scores(summary: Mapping[str, Any]) -> Iterator[str]:
    yield "| score | before | after | change ± se |\n| --- | --- | --- | --- |"
    total = {"before": summary["reward_before"], "after": summary["reward_after"]}
    total |= {"gain": summary["gain"], "gain_se": summary["gain_se"]}
    for label, one in {"reward": total, **summary["scores"]}.items():
        name = f"{label} (judge)" if label in summary["judges"] else label
        yield f"| {name} | {one['before']:.4g} | {one['after']:.4g} | {one['gain']:+.3g} ± {one['gain_se']:.2g} |"


def _distance(summary: Mapping[str, Any]) -> str:
    """Of the pictures from the base model's, as far as it was measured."""
    said = [f"KL from the base model {summary['kl']:.3g} nats a chain"] if summary["kl"] is not None else []
    before, after = summary["diversity_before"], summary["diversity_after"]
    if before is not None and after is not None:
        said.append(f"diversity of a prompt's pictures {before:.3g} before, {after:.3g} after")
    return f" {'; '.join(said)}." if said else ""


def _snippet(config: RunConfig, summary: Mapping[str, Any], place: str, fused: bool) -> Iterator[str]:
    """Plain diffusers that draws as the run did; flow models without the noise of its steps."""
    pipeline, ddim = summary["pipeline"], summary["pipeline"]["scheduler"] == "DDIMScheduler"
    kind, lines = ("DiffusionPipeline", [_read(repr(place), config, {})]) if fused else _base(config, pipeline["class"])
    names = [kind, *(["DDIMScheduler"] if ddim else []), *(["MotionAdapter"] if "MotionAdapter" in lines[-1] else [])]
    yield f"import torch\nfrom diffusers import {', '.join(sorted(names))}"
    if not fused and config.adapter.type != "LORA":
        yield "from peft import PeftModel"
    *notes, reading = lines
    yield "\n" + "\n".join([*notes, f"pipeline = {kind}.{reading}"])
    if ddim:
        spacing = f"timestep_spacing={config.sampler.timestep_spacing!r}"
        spacing += (
            ', beta_schedule="linear"' if config.model.motion_adapter and not fused else ""
        )  # its own noise levels
        yield f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, {spacing})"
    for path, strength in () if fused else config.model.merge.items():
        yield f"pipeline.load_lora_weights({path!r})\npipeline.fuse_lora(lora_scale={strength!r})"
        yield "pipeline.unload_lora_weights()"
    off = [] if fused else summary["steps_off"]
    yield from () if fused else _loading(config, summary, place)
    if off:
        yield _CALLBACK.format(first=off[0])
    same = len({*config.sampler.etas}) == 1
    if ddim and not same:
        yield "# the run's noise differs by step (sampler.eta, sampler.noisy_steps), which this call cannot be told"
    call = dict(pipeline["call"]) | ({"eta": config.sampler.etas[0]} if ddim and same else {})
    options = [f"{name}={value!r}" for name, value in call.items()]
    options += ["callback_on_step_end=without_adapter"] if off and config.adapter.type == "LORA" else []
    yield f"result = pipeline({', '.join(['**inputs' if pipeline['columns'] else repr(pipeline['prompt']), *options])})"


def _base(config: RunConfig, kind: str) -> tuple[str, list[str]]:
    """The class that reads the base, and its call, after what is to be said of it."""
    model, base = config.model, repr(config.model.path)
    if isinstance(model.single_file, str):
        return kind, [_read(repr(model.single_file), config, {"config": base}, "from_single_file")]
    notes = [f"# {part}: with the weights of {file!r}" for part, file in (model.single_file or {}).items()]
    if model.name in EMBEDDED:
        notes, base = [*notes, "from rlr_ray.models.names import EMBEDDED\n"], f"EMBEDDED[{model.name!r}]"
    if model.quantization:
        notes.append(f"# the run had its frozen weights rounded by {model.quantization.backend}; here they are whole")
    options = {name: repr(value) for name in ("revision", "variant") if (value := getattr(model, name)) is not None}
    if not model.motion_adapter:
        return "DiffusionPipeline", [*notes, _read(base, config, options)]
    motion = {"motion_adapter": f"MotionAdapter.from_pretrained({model.motion_adapter!r})"}
    return "AnimateDiffPipeline", [*notes, _read(base, config, options | motion)]


def _read(place: str, config: RunConfig, options: Mapping[str, str], by: str = "from_pretrained") -> str:
    told = "".join(f", {name}={value}" for name, value in options.items())
    return f"{by}({place}, dtype=torch.{config.model.dtype}{told})"


_CALLBACK = """

def without_adapter(pipeline, step, timestep, tensors):  # the run drew its last steps with the base model
    if step + 1 == {first}:
        pipeline.disable_lora()
    return {{}}


pipeline.enable_lora()  # before each call, since the one before left it off"""


def _loading(config: RunConfig, summary: Mapping[str, Any], place: str) -> Iterator[str]:
    """Lines that load an adapter: several parts have a folder each."""
    parts, in_one_file = summary["pipeline"]["parts"], summary["adapter"].endswith(LORA_FILE)
    if config.adapter.type != "LORA":
        for part in parts:
            folder = f", subfolder={part!r}" if len(parts) > 1 else ""
            adapted = f"PeftModel.from_pretrained(pipeline.{part}, {place!r}{folder})"
            yield f"pipeline.{part} = {adapted}.base_model.model"
        return
    for part in [""] if in_one_file else parts:
        where = f", subfolder={part!r}" if part else ""
        second = f", load_into_{part}=True" if part.endswith("_2") else ""
        yield f"pipeline.load_lora_weights({place!r}{where}, weight_name={LORA_FILE!r}{second})"
