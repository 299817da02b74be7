"""Losses that never see all logits at once, and logits that are computed when somebody reads them."""
