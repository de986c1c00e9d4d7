"""Should I compress my gradients? Measured on a model, predicted on a cluster, validated by training."""
