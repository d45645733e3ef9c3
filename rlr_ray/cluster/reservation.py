"""Sharing a cluster with Ray Train and the autoscaler: who may count on how much.

Ray's own coordinator (the one of Ray Train and Ray Data) packs every requester's wishes into the cluster's nodes, by
priority, and tells the autoscaler what is missing. Elastic workers rely on it, so it must know of rollout actors. It is
not a public part of Ray: this file is the only one that touches it.
"""

from __future__ import annotations

import ray
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from rlr_ray.cluster_config import Resources

_EXPIRES_S = 60.0  # if the driver dies


class Reservation:
    """So many equal bundles that a run wishes for; renewed now and then, it says how many there are."""

    def __init__(self, name: str, bundle: Resources, count: int, *, essential: bool):
        self.name, self.bundle, self.count = name, bundle, count
        self.priority = ResourceRequestPriority.HIGH if essential else ResourceRequestPriority.LOW
        self.coordinator = get_or_create_autoscaling_coordinator()

    def renew(self) -> int:
        """How many of the bundles the cluster has room for, besides all that comes before them."""
        if not self.bundle or not self.count:
            return self.count
        request = self.coordinator.request_resources.remote(
            self.name, [self.bundle] * self.count, _EXPIRES_S, priority=self.priority
        )
        ray.get(request)
        nodes = ray.get(self.coordinator.get_reserved_resources.remote(self.name, recompute=True))
        kind, amount = next(iter(self.bundle.items()))
        return sum(round(node.get(kind, 0) / amount) for node in nodes.values())

    def cancel(self) -> None:
        ray.get(self.coordinator.cancel_request.remote(self.name))
