"""Protocols: one module each; contract: listen(service, ...)."""
