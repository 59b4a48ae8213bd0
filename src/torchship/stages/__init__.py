"""Ready-made stages."""
