"""The wire: bytes to messages and back, without sockets."""
