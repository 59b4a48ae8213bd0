"""The doctor says what this machine can run, why a model does not export, and what a run-time failure means."""
