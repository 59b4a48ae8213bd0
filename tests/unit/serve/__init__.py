"""Tests of the serving half: line, catalog, configuration."""
