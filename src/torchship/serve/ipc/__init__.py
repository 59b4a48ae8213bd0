"""What the host and its children share: memory, messages that carry descriptors, and what a child prints."""
