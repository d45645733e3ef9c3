"""A plan's shape described in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlr_ray.core.plan_shape import PlanShape


def shape_words(shape: PlanShape) -> str:
    """Says which order owns which steps, and whether the sum is biased."""
    if shape.switch:
        before, *_, after = shape.alternatives
        return f"{shape_words(before)}; once a surrogate is trusted: {shape_words(after)}"
    parts = []
    if shape.sub_chain_length:
        parts.append(f"half order{_by_pairs(shape)} on {_sub_chains(shape)}")
    if shape.forward_possible:
        where = f"steps {', '.join(map(str, shape.forward_possible))}" if shape.forward_steps else "its signal levels"
        of = " of what first order leaves" if shape.free_stop == 0 else ""
        parts.append(f"half order by a forward term{of}, {shape.draws} draws a chain at {where}")
    if shape.free_steps > 0:
        step_by_step = f"half order{_by_pairs(shape)}, step by step,"
        orders = {"zeroth_order": "zeroth order", "half_order": step_by_step, "none": "nothing"}
        others = "every step" if shape.free_steps == shape.trained else f"the other {shape.free_steps}"
        parts.append(f"{orders[shape.rest]} on {others}")
    if shape.residual:
        parts[0] = f"of what that leaves of the reward: {parts[0]}"
    if shape.first_order_steps:
        parts.insert(0, _first_order(shape))
    base = f", the last {f'{shape.off} ' if shape.off > 1 else ''}without the adapter" if shape.off else ""
    return f"{shape.steps} steps{base}: " + "; ".join(parts) + (" (biased)" if shape.biased else "")


def _first_order(shape: PlanShape) -> str:
    count = f"the last {shape.first_order_steps}"
    if shape.truncation != "fixed":
        law = {"russian_roulette": "divided by its probability", "random": "unweighted"}[shape.truncation]
        count += f" and a random number of earlier ones, each {law}"
    elif shape.first_order_steps == shape.trained:
        count = "every step"
    if shape.linear:
        count = f"{shape.first_order_steps} steps drawn from all, by linear adjoints"
    of = "of the surrogate " if shape.residual else "of the differentiable rewards " if shape.mixed else ""
    others = ", half order there of the others" if shape.mixed_blocks else ""
    return f"first order {of}on {count}{others}"


def _by_pairs(shape: PlanShape) -> str:
    if shape.score != "branches":
        return ""
    return " by pairs" if shape.branch_steps is None else f" by pairs at {shape.branch_steps} of them an update"


def _sub_chains(shape: PlanShape) -> str:
    length = f"{shape.sub_chain_length} step{'s' * (shape.sub_chain_length > 1)}"
    if shape.position == "cover":
        return f"sub-chains of {length} that cover {'every step' if shape.residual else 'the others'}"
    many = f"{shape.sub_chain_count} sub-chains" if shape.sub_chain_count > 1 else "a sub-chain"
    places = {"uniform": "", "importance": " drawn by gradient norm"}
    where = (
        places[shape.position]
        if isinstance(shape.position, str)
        else f" within steps {shape.position[0]}-{shape.position[1]}"
    )
    return f"{many} of {length}{where}"
