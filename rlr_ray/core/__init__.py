"""The estimators, in torch and the standard library only.

Letters used in every file of this folder: T denoising steps, B chains, C H W latent, P trainable numbers,
N perturbations.
Steps count k = 0 .. T-1 in the order they run, 0 the noisiest; the paper's t is T - k.
"""
