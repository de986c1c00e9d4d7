"""PyTorch's own communication hooks beside ours, under torchrun."""
