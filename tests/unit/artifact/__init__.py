"""Tests of artifact."""
