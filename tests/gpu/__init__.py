"""Tests that need a CUDA card; `make gpu` runs them."""
