"""Tests of the kind: journeys."""
