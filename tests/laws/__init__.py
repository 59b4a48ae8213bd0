"""Tests of the kind: laws."""
