"""MiniLM sentence embeddings with its real weights: sentences of any length, similarities of meaning."""
