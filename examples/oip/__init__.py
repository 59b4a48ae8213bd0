"""The models that Triton's own client examples ask for, as plain Python stages: no artifact, no torch."""
