"""A frozen denoiser whose weights lie in parts on several processes, each block gathered while it computes.

Parameters are cut and gathered by PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`). When they are gathered is
settled here: FSDP's own hooks take it that all processes make the same calls in the same order, and that none is made
inside a backward. Here the leading process evaluates alone, chunks differ in how many steps they backpropagate, and
checkpointing runs whole steps again on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._pytree import tree_leaves

from rlr_ray.errors import UserError
from rlr_ray.models import DENOISERS, module_bytes

_MOST = 1 / 16  # of a denoiser's bytes that one block may have, if it has parts
_LEAST = 1 / 1000  # of them: what is smaller stays whole in every process
_NONE = -1  # no block: the process waits


class Shards:
    """The blocks of the processes of torch's default group, all of which make it at the same time.

    Whoever needs a block tells the others in a round, which all take part in: those that compute by asking for their
    next block, and those that have nothing to do by waiting (`wait`). So processes may differ in what they call, in
    which order and how often, as long as each waits before it does anything else that needs the others. A process
    holds one block whole at a time; values are those of the uncut weights, bit for bit.
    """

    def __init__(self, device: torch.device):
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.asking = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.groups: list[FSDPModule] = []
        self.whole = _NONE  # the block that is gathered here

    def cut(self, denoiser: nn.Module) -> None:
        """Leave this process its part of each of a denoiser's blocks, on its device. What trains is added later."""
        denoiser.requires_grad_(False)
        size = module_bytes(denoiser)
        for block in list(_blocks(denoiser, size * _MOST, size * _LEAST)):
            number = len(self.groups)
            self.groups.append(fully_shard(_Group(block), mesh=self.mesh))
            block.register_forward_pre_hook(lambda *_, number=number: self.gather(number))
            block.register_forward_hook(
                lambda _, args, kwargs, output, number=number: self._before_backward(number, (args, kwargs), output),
                with_kwargs=True,
            )

    def cut_all(self, pipeline: Any) -> None:
        """Cut the denoisers of a pipeline that has just been loaded, before they are moved."""
        for name in DENOISERS:
            if isinstance(denoiser := getattr(pipeline, name, None), nn.Module):
                self.cut(denoiser)

    def check(self, model: Any) -> None:
        """Raise UserError if what is trained of a model cannot run where weights come and go."""
        if not model.tuned.per_chain:
            raise UserError(
                "cluster.worker.shard is true, but some of the adapter is not LoRA on a linear layer (target_modules "
                "name a convolution, or an option makes it another kind); allowed: plain LoRA on linear layers; "
                "change adapter.target_modules, or set cluster.worker.shard: false"
            )

    def gather(self, number: int) -> None:
        """Hold this block whole, and no other."""
        if self.whole != number:
            self._round(number)

    def wait(self) -> None:
        """Help the other processes until all of them wait."""
        while self._round(_NONE):
            pass

    def _round(self, wanted: int) -> bool:
        """Gather what any process wants; False if none wants anything."""
        if self.whole != _NONE:
            self.groups[self.whole].reshard()
        self.whole = wanted
        told = [torch.empty(1, dtype=torch.long) for _ in range(self.mesh.size())]
        dist.all_gather(told, torch.tensor([wanted]), group=self.asking)
        every = {int(one) for one in told} - {_NONE}
        for number in sorted(every):
            self.groups[number].unshard()
            if number != wanted:
                self.groups[number].reshard()
        return bool(every)

    def _before_backward(self, number: int, inputs: Any, output: Any) -> None:
        """Have the block gathered again when a gradient arrives at what it put out.

        Autograd runs nodes in the reverse of the order in which they were made, so all of a block's run before the next
        block's gradient arrives.
        """
        if not torch.is_grad_enabled():
            return
        passed = {id(x) for x in tree_leaves(inputs)}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in passed:
                x.register_hook(lambda _: self.gather(number))


class _Group(nn.Module):
    """Holds a block for FSDP: hooks on this, which is never called, never run."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


def _blocks(module: nn.Module, most: float, least: float) -> Iterator[nn.Module]:
    """The modules inside that are gathered at once: as large as may be, and each called as a module."""
    for child in module.children():
        size = module_bytes(child)
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or (size > most and any(child.children())):
            yield from _blocks(child, most, least)
        elif size >= least:
            yield child
