"""A YOLO-style detector of three modules, each with a precision of its own; suppression stays outside of the model."""
