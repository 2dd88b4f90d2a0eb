"""Device functions that the kernels of every op share."""
