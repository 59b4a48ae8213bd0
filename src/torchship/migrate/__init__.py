"""Brings foreign models in."""
