"""Where observations go: one module a kind of sink, each fed by a bounded queue of its own."""
