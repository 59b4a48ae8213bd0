"""Tests of the theatre: line, catalog, configuration."""
