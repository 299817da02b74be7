"""A device whose memory is counted: every storage that operations make, while it is entered."""

from live_bytes import LiveBytes


class Counted:
    """The memory of a device with `size` bytes, all for this process."""

    def __init__(self, size=2**60):
        self.size = size
        self.counting = LiveBytes()

    def total(self):
        return self.size

    def capacity(self):
        return self.size

    def allocated(self):
        return self.counting.living()

    def peak(self):
        return self.counting.peak

    def reset(self):
        self.counting.peak = self.allocated()
