"""Differentially private training: sampling, per-unit clipping, noise and the optimizer step."""
