"""Decoder layers as two autograd functions with hand-written backwards, for any `BlockLayout`."""
