"""Export trained networks to ONNX, torch.export programs and safetensors, and load what was exported."""
