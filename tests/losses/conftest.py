"""Fixtures of this folder."""

from tiny_llama import model as model
