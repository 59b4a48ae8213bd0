"""Unit tests of the optimize room."""
