"""Diffusive Chain-of-Thought: prompts with a part for each range of steps, and where the ranges lie."""
