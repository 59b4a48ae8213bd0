"""HTTP/2 (RFC 9113), and gRPC on its streams."""
