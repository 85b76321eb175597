"""Local training and evaluation in plain PyTorch and MONAI. It knows nothing of FLARE."""
