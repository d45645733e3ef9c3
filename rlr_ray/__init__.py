"""Fine-tune diffusion models to a reward with the Recursive Likelihood Ratio estimator."""
