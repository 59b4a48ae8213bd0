"""Pipelines: stages in a row or a graph, as plain data, checked before anything starts."""
