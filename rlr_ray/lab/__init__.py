"""The laboratory: estimators measured against the exact gradient, and the best plan for a budget."""
