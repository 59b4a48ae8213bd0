"""The client and the load generator."""
