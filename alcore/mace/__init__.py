"""MACE as the surrogate: models, batched evaluation, random features for the correction, training."""
