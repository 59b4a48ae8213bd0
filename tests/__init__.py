"""Tests, by kind: unit, contracts, laws, journeys, house."""
