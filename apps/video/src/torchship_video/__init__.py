"""Watch cameras: detect, track and recognize again across many of them, on torchship."""
