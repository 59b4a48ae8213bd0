"""A model that decides while it runs: what the doctor says about it, and two ways to serve it."""
