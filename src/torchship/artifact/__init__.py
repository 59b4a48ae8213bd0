"""Artifacts: an immutable folder that holds a model as it was measured, and the store that keeps them."""
