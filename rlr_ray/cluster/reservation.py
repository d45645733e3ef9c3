"""Sharing a cluster with Ray Train and the autoscaler: who may count on how much.

Ray's own coordinator (the one of Ray Train and Ray Data) packs every requester's wishes into the cluster's nodes, by
priority, and tells the autoscaler what is missing. Elastic workers rely on it, so it must know of rollout actors. It is
not a public part of Ray: this file is the only one that touches it.
"""

from __future__ import annotations

import uuid
from collections import Counter

import ray
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from rlr_ray.cluster_config import Resources

_EXPIRES_S = 120.0  # if the driver dies
_ANSWER_S = 60.0  # its first answer is that of a process which starts, perhaps beside many others


class Reservation:
    """So many equal bundles that a run wishes for; renewed now and then, it says where there are how many."""

    def __init__(self, bundle: Resources, count: int, *, essential: bool):
        self.name, self.bundle, self.count = f"rlr-ray-{uuid.uuid4().hex}", bundle, count
        self.priority = ResourceRequestPriority.HIGH if essential else ResourceRequestPriority.LOW
        self.coordinator = get_or_create_autoscaling_coordinator()

    def renew(self) -> Counter[str]:
        """How many of the bundles each node, by its id, has room for, besides all that comes before them.

        Raises RayError if the coordinator does not answer.
        """
        if not self.bundle or not self.count:
            return Counter()
        wishes = [self.bundle] * self.count
        request = self.coordinator.request_resources.remote(self.name, wishes, _EXPIRES_S, priority=self.priority)
        ray.get(request, timeout=_ANSWER_S)
        answer = self.coordinator.get_reserved_resources.remote(self.name, recompute=True)
        nodes: dict[str, Resources] = ray.get(answer, timeout=_ANSWER_S)
        kind, amount = next(iter(self.bundle.items()))
        return Counter({node: round(there.get(kind, 0) / amount) for node, there in nodes.items()})

    def cancel(self) -> None:
        self.coordinator.cancel_request.remote(self.name)
