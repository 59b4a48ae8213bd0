"""The theatre: artifacts and pipelines served on lines of worker processes."""
