"""Where frames come from: one module a kind of source, each run in a process of its own."""
