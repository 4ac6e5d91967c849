"""Adaptive-rank fine-tuning (AdaLoRA) with sharded models."""
