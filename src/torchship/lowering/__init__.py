"""What several backends share: a Model lowered to an exported program or to ONNX, and a torch callable as a Stage."""
