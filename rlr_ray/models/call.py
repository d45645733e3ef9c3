"""A diffusers pipeline's own call, with its scheduler's step and its modules' calls in our hands.

A run is one call. Up to its step k nothing is computed: modules return zeros of the right shape, and step k - 1 puts
out the latent of step k. There the model is called, and the call is left by an exception; without a step to stop at it
decodes what its last step put out. What is frozen and called before the first denoiser call (prompts, images, control)
is computed once a batch, and kept on the batch's tape.

B chains, T steps, P numbers. A step has parts, one for each latent that it moves: of LTX-2 a video's and its sound's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlr_ray.errors import UserError
from rlr_ray.models import DENOISERS, seams
from rlr_ray.models.rows import ByRow
from rlr_ray.models.trained import Trained

_BESIDE = ("controlnet",)  # beginnings of the names of frozen ones that steps call
_ENCODERS = ("encode_prompt", "encode_image")
_STEP_OPTIONS = {"return_dict", "generator", "eta"}  # what a step may be told besides; none changes ours


@dataclass
class Batch:
    """What the chains of a batch are asked for: arguments of the pipeline's call, and a seed each."""

    arguments: Mapping[str, Any]
    seeds: Sequence[int]
    generators: list[torch.Generator] = field(default_factory=list)
    tape: dict[Any, Any] = field(default_factory=dict)  # a frozen part's n-th call -> what it returned
    zeros: dict[tuple[str, int], Any] = field(default_factory=dict)  # a part's n-th call that is passed over -> zeros


@dataclass
class _Run:
    """One call of the pipeline, and how far it is."""

    batch: Batch
    k: int | None  # the step at which the call is left; None: it goes to its end
    parts: Sequence[Tensor] | None = None  # the latents that step k, or the decoder, starts from; None: the call's own
    theta: Tensor | None = None  # [P] or [B, P]; None: denoisers return zeros
    stop: int = 0  # steps that are passed over
    calls: int = 0  # of scheduler.step
    begun: bool = False  # a denoiser has been called
    counts: dict[str, int] = field(default_factory=dict)  # calls by name that the tape or zeros answered
    put_out: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # part -> as the call has it, in float32
    seen: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)  # times, latents and outputs from step k on
    prepared: list[Tensor] = field(default_factory=list)  # what `prepare_latents` made
    first: Tensor | None = None  # the latent of the call's first step, in its own dtype
    probing: bool = False  # nothing is computed, and the call is left where it would decode
    drew: bool = False  # from torch's own generators
    result: Any = None  # what the call returned; None if it was left

    def next(self, name: str) -> tuple[str, int]:
        """The place of a part's call among those of its name."""
        self.counts[name] = self.counts.get(name, -1) + 1
        return name, self.counts[name]


_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)


class Left(BaseException):
    """The call is left. Not an Exception, so that no pipeline catches it."""


class PipelineCall:
    """A pipeline, any part of whose call can be run by itself; `tuned` says at which numbers its denoisers run.

    The pipeline keeps its scheduler and what its call sets of itself; its modules are called through seams from now on.
    """

    def __init__(self, pipeline: Any, solver: Any, tuned: Trained, decode_slice: int | None):
        self.pipeline, self.tuned, self.solver = seams.lookalike(pipeline), tuned, solver
        self.arguments: dict[str, Any] = {}  # that all chains share
        self.steps = 0  # T, once it is known; a run to the end passes over all
        self.count = 1  # of a step's parts
        self.slot: int | None = None  # which tensor of prepare_latents' the steps start from, once it is known
        self.plain: Tensor | None = None  # [1, ...] of its kind, if it is all that a call draws and prepares
        self.draws = True  # the call may draw from torch's own generators
        self.pipeline.scheduler = solver
        self.pipeline.progress_bar = seams.Silent
        self.pipeline.maybe_free_model_hooks = lambda: None  # looks through all modules
        if hasattr(pipeline, "prepare_extra_step_kwargs"):  # of scheduler.step, of which ours takes none
            self.pipeline.prepare_extra_step_kwargs = lambda *args, **kwargs: {}
        if hasattr(self.pipeline, "safety_checker"):  # it looks at numpy's pictures, and blackens some
            self.pipeline.safety_checker = None
        self._call = getattr(type(pipeline).__call__, "__wrapped__", type(pipeline).__call__)  # without its no_grad
        self._zeros = seams.Zeros()
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self._take(name, part, decode_slice)
        for name in _ENCODERS:
            if hasattr(pipeline, name):
                setattr(self.pipeline, name, self._taped(name, ByRow(getattr(self.pipeline, name))))
        if hasattr(pipeline, "prepare_latents"):
            self.pipeline.prepare_latents = self._prepared(self.pipeline.prepare_latents)
        if hasattr(pipeline, "image_processor"):
            self.pipeline.image_processor = seams.at_once(pipeline.image_processor)
        solver.set_timesteps = seams.remembered(solver)
        solver.step = self._step_of(solver.step)

    def _take(self, name: str, part: Any, decode_slice: int | None) -> None:
        forward = part.forward
        in_steps = name in DENOISERS or name.startswith(_BESIDE)
        seam = self._denoiser(name, forward) if in_steps else self._taped(name, forward)
        seams.keep_signatures(part)
        part.forward = functools.wraps(forward)(seam)
        if callable(getattr(part, "encode", None)):
            part.encode = functools.wraps(part.encode)(self._taped(f"{name}.encode", part.encode))
        if callable(getattr(part, "decode", None)):
            if decode_slice is not None and isinstance(getattr(part, "decoder", None), nn.Module):
                seams.by_latent_frame(part.decoder)
            part.decode = functools.wraps(part.decode)(_decoder(part, part.decode, decode_slice))

    def _ran(self, run: _Run) -> _Run:
        run.stop, token = self.steps if run.k is None else run.k, _RUN.set(run)
        try:
            if not self.draws:
                self._run(run)
                return run
            device = self.pipeline._execution_device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(run.batch.seeds[0])
                before = seams.states(device)
                self._run(run)
                run.drew = not torch.equal(before, seams.states(device))
                return run
        finally:
            _RUN.reset(token)

    def _run(self, run: _Run) -> None:
        batch, one_or_all = run.batch, None
        if self.plain is None or run.parts is None:  # else nothing is drawn
            batch.generators = batch.generators or [torch.Generator() for _ in batch.seeds]
            for generator, seed in zip(batch.generators, batch.seeds, strict=True):
                generator.manual_seed(seed)
            one_or_all = batch.generators if len(batch.generators) > 1 else batch.generators[0]
        with suppress(Left):
            run.result = self._call(self.pipeline, **self.arguments, **batch.arguments, generator=one_or_all)

    def output(self, batch: Batch, k: int, parts: Sequence[Tensor] | None, theta: Tensor | None) -> _Run:
        """The run that was left at step k, with each part's latent as the call had it, and what the model said."""
        return self._ran(_Run(batch, k, parts, theta))

    def passed_over(self, batch: Batch) -> _Run:
        """A run over all steps, none computed, until it would decode: their times and the latents that move."""
        return self._ran(_Run(batch, None, probing=True))

    def decoded(self, batch: Batch, parts: Sequence[Tensor]) -> Any:
        """What the call returns where its last step puts out these latents."""
        return self._ran(_Run(batch, None, parts)).result

    def _step_of(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def call(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            run = _RUN.get()
            assert run is not None, "this scheduler is a PipelineCall's; a plain pipeline needs another"
            if unknown := sorted(set(options) - _STEP_OPTIONS):
                raise UserError(
                    f"this pipeline's steps are told {', '.join(unknown)} besides, which a linear step does not heed; "
                    "such a pipeline cannot be trained here"
                )
            run.first = sample if run.first is None else run.first
            k, part = divmod(run.calls, self.count)
            run.calls += 1
            if part + 1 == self.count:
                seams.count_step(self.solver, timestep)
            theirs, ours = run.put_out.get(part, (None, sample))
            latent = ours if sample is theirs else sample.float()  # float32 as long as the call changes nothing
            if k >= run.stop or run.probing:
                run.seen.append((float(timestep), latent, model_output.float()))
                if run.k is not None and part + 1 == self.count:
                    raise Left
            elif k == run.stop - 1 and run.parts is not None:
                latent = run.parts[part]
            latent = latent.contiguous()  # strides change bits
            run.put_out[part] = latent.to(torch.promote_types(sample.dtype, model_output.dtype)), latent
            put_out = run.put_out[part][0]
            return SimpleNamespace(prev_sample=put_out) if options.get("return_dict", True) else (put_out, put_out)

        call.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # pipelines ask for it each time
        return call

    def _prepared(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """The latents that steps start from, ours where the run says them."""

        @functools.wraps(prepare)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = _RUN.get()
            if run is not None and self.plain is not None and run.parts is not None:
                theirs, ours = self.plain, run.parts[0]
                if run.k != 0:
                    return theirs.expand(len(run.batch.seeds), *theirs.shape[1:])
                run.put_out[0] = ours.to(theirs.dtype), ours
                return run.put_out[0][0]
            latents = prepare(*args, **kwargs)
            if run is None:
                return latents
            tensors = [latents] if isinstance(latents, Tensor) else list(latents)
            if run.k == 0 and run.parts is not None and self.slot is not None:
                theirs, ours = tensors[self.slot], run.parts[0]
                tensors[self.slot] = ours.to(theirs.dtype)
                run.put_out[0] = tensors[self.slot], ours
            run.prepared = tensors
            return tensors[0] if isinstance(latents, Tensor) else tuple(tensors)

        return call

    def _denoiser(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def live(theta: Tensor, args: Any, kwargs: Any) -> Any:
            if name not in self.tuned.modules:
                return forward(*args, **kwargs)
            with _no_run():
                tensors = self.tuned.of(name, theta)
                return functional_call(self.tuned.modules[name], tensors, args, kwargs, tie_weights=False)

        def call(*args: Any, **kwargs: Any) -> Any:
            run = _RUN.get()
            if run is None:
                return forward(*args, **kwargs)
            run.begun = True
            if run.theta is None or run.calls // self.count != run.k:
                return self._zeros_of(run, name, forward, args, kwargs, seams.rows_of(args, kwargs))
            if run.theta.dim() == 1:
                return live(run.theta, args, kwargs)
            theta = seams.by_rows(run.theta, seams.rows_of(args, kwargs))
            return live(theta, args, kwargs) if self.tuned.per_chain else seams.vmapped(live, theta, args, kwargs)

        return call

    def _taped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A frozen part: before the first denoiser call run once a batch, while steps are passed over not at all."""

        def call(*args: Any, **kwargs: Any) -> Any:
            run = _RUN.get()
            if run is None or (run.begun and not run.probing and run.calls // self.count >= run.stop):
                return function(*args, **kwargs)
            if run.begun:
                return self._zeros_of(run, name, function, args, kwargs)
            key = run.next(name)
            if key not in run.batch.tape:
                with _no_run(), torch.no_grad():
                    run.batch.tape[key] = function(*args, **kwargs)
            return run.batch.tape[key]

        return call

    def _zeros_of(
        self, run: _Run, name: str, function: Callable[..., Any], args: Any, kwargs: Any, rows: int = 0
    ) -> Any:
        place = run.next(name)
        if place not in run.batch.zeros:
            with _no_run():
                run.batch.zeros[place] = self._zeros.of(name, function, args, kwargs, rows)
        return run.batch.zeros[place]


@contextmanager
def _no_run() -> Iterator[None]:
    """Inside, calls are plain."""
    token = _RUN.set(None)
    try:
        yield
    finally:
        _RUN.reset(token)


def _decoder(part: Any, decode: Callable[..., Any], size: int | None) -> Callable[..., Any]:
    decode = seams.in_slices(decode, part.dtype, size)

    def call(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is not None and run.probing and run.begun:
            raise Left
        return decode(z, *args, **kwargs)

    return call
