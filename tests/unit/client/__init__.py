"""Tests of the clients and the load generator."""
