"""The pages of figures, written from bench/results."""
