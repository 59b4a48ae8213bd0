"""Tests of the front doors, with a service that answers in this process."""
