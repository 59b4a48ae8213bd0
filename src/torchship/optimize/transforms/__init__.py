"""Transforms: one module each; contract: apply(model, options) -> Model."""
