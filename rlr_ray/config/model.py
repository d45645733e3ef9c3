"""What is fine-tuned: the base model, what of it is trained, and how it is sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlr_ray.config.base import FREE, Strict
from rlr_ray.core.schedule import Schedule, steps_off


class QuantizationConfig(BaseModel):
    """Other keys go to the backend's own config."""

    model_config = ConfigDict(extra="allow", frozen=True)
    # Which package holds the weights: torchao, in 8 bits unless its `quant_type` says otherwise; bitsandbytes on GPUs
    backend: Literal["torchao", "bitsandbytes_4bit", "bitsandbytes_8bit"]
    parts: list[str] | None = Field(None, min_length=1)  # of the pipeline; None: its denoisers

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelConfig(Strict):
    # auto: of the pipeline's own class; digits or moving_digits: embedded ones; others refuse all classes but theirs
    name: str = "auto"
    path: str | None = None  # folder or hub name of the pipeline
    revision: str | None = None  # of a pipeline on the hub: branch, tag or commit
    variant: str | None = None  # of the weights' files, e.g. fp16: `*.fp16.safetensors`
    # Weights in one file, in place of those at path, which still says how the model is built: a checkpoint of the whole
    # pipeline, or files by part, GGUF's too, {transformer: FILE}
    single_file: str | dict[str, str] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights
    quantization: QuantizationConfig | None = None  # of frozen weights, as they are read
    height: int | None = Field(None, ge=8)  # pixels; None: the model's own size
    width: int | None = Field(None, ge=8)  # pixels; None: the model's own size
    num_frames: int | None = Field(None, ge=2)  # of a video; None: the model's own number
    motion_adapter: str | None = None  # of AnimateDiff: folder or hub name
    # LoRA that are put into the frozen weights before anything else, by file, folder or hub name: their strengths
    merge: dict[str, float] = Field(default_factory=dict)
    # Whether gradients pass through the denoiser; false: it is only run, and preset auto is es, zeroth order alone
    differentiable: bool = True
    # Arguments of the pipeline's own call that all chains share, e.g. {max_sequence_length: 256}
    call: dict[str, Any] = Field(default_factory=dict)
    # Text and image encoders are in main memory but while they encode; what they said is kept there in any case
    offload: Annotated[bool, FREE] = False
    # The denoiser's activations are computed again for the gradient, by blocks
    gradient_checkpointing: Annotated[bool, FREE] = False
    # Pictures, frames or videos decoded at once; None: all
    decode_slice: Annotated[int | None, FREE] = Field(None, ge=1)
    # The denoiser, by torch.compile: minutes at each process's start, then faster steps
    compile: Annotated[bool, FREE] = False


class AdapterConfig(BaseModel):
    """`type` is PEFT's name; every other key goes to PEFT's config of that type."""

    model_config = ConfigDict(extra="allow", frozen=True, serialize_by_alias=True)
    type: str = "LORA"  # PEFT's name of the adapter; keys beside it go to PEFT's config of that type
    # A LoRA that training begins with: file, folder (a run's too) or hub name. Without PEFT's keys it says them itself
    from_: str | None = Field(None, alias="from")
    strength: float = 1.0  # that it begins with
    # Parts that are trained, of those that steps call; or by part PEFT's keys that differ there,
    # {transformer: {r: 16}, transformer_2: {}}; null: all
    on: list[str] | dict[str, dict[str, Any] | None] | None = Field(None, min_length=1)
    seed: int = 0  # of the initial values
    # Last steps that the base model draws, in training, evaluation and `sample`: those whose noise, relative to what
    # the model's output moves there, is below this part of the step before's (auto: a third); null: none
    off_below: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] | None = "auto"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def options_of(self, part: str) -> dict[str, Any]:
        return self.options | ((self.on.get(part) or {}) if isinstance(self.on, dict) else {})

    def steps_off(self, schedule: Schedule) -> int:
        """Number of last steps of a schedule that run without the adapter."""
        return steps_off(schedule, 1 / 3 if self.off_below == "auto" else self.off_below or 0.0)


Eta = Annotated[float, Field(ge=0, le=1)]


class SamplerConfig(Strict):
    steps: int = Field(50, ge=1, le=1000)  # T, of a chain
    # 0: no noise. Of DDIM (Stable Diffusion to XL), 1: ancestral sampling. Of flow models: Flow-GRPO's noise level a.
    # Of all steps, or a list with each step's own
    eta: Eta | list[Eta] = 1.0
    noisy_steps: tuple[int, int] | None = None  # first and last step, from 0, that have this noise; None: all
    guidance_scale: float = Field(5.0, ge=1)  # classifier-free; 1: none
    embedded_guidance_scale: float | None = Field(None, ge=0)  # FLUX.1 dev: told to the model as an input; None: 3.5
    # How the T steps lie among the model's own, in diffusers' words
    timestep_spacing: Literal["trailing", "leading", "linspace"] = "trailing"

    @model_validator(mode="after")
    def _as_many(self) -> SamplerConfig:
        if isinstance(self.eta, list) and len(self.eta) != self.steps:
            raise ValueError(f"eta has {len(self.eta)} values, found steps: {self.steps}; give one, or one a step")
        first, last = self.noisy_steps or (0, self.steps - 1)
        if not 0 <= first <= last < self.steps:
            raise ValueError(f"noisy_steps is [{first}, {last}]; allowed: 0 <= first <= last <= {self.steps - 1}")
        return self

    @property
    def etas(self) -> list[float]:  # [T]
        """Every step's own."""
        first, last = self.noisy_steps or (0, self.steps - 1)
        told = self.eta if isinstance(self.eta, list) else [self.eta] * self.steps
        return [eta if first <= k <= last else 0.0 for k, eta in enumerate(told)]
