"""What sloth-plugins ships: architectures as data, replacement forwards, kernels."""
