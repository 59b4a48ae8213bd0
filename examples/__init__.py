"""Examples: each folder is a small, real use of torchship that a test runs."""
