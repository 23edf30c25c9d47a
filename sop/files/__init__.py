"""Models and other files as they come: GGUF, safetensors, folders, calibrations."""
