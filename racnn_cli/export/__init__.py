"""A trained network as files that run elsewhere: ONNX, torch.export programs, safetensors; and reading them back."""
