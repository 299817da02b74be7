"""Faster fine-tuning of open language models by one environment flag."""
