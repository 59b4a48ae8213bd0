"""Backends: one module an execution engine; contract: probe, propose, build, open."""
