"""Speed and accuracy claims, one command each: `python -m benchmarks.NAME`."""
