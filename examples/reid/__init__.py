"""Networks for re-identification: ResNet50-IBN-a, OSNet, and a small embedder trained on one street scene."""
