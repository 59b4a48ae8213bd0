"""EfficientNet-Lite0 with its ImageNet weights: from nn.Module to an answer over REST."""
