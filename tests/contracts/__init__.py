"""Tests of the kind: contracts."""
