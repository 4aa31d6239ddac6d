"""The DeepSeek-V4 model: parameters under their released names, and calls to operations."""
