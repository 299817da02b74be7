"""`sloth-plugins bench`: stock against patched, and rivals, on the user's own model and card."""
