"""Tests of the kind: house."""
