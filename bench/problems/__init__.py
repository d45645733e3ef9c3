"""Problems that no default was tuned on: their recipes, rewards and pipelines."""
