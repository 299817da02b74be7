"""What stands for TRL in tests: trainers of somebody else's, with methods to replace and functions that they call."""

import functools

from transformers import Trainer


def halve(loss):
    return loss / 2


def traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class ToyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = self.shape(loss)
        return (loss, outputs) if return_outputs else loss

    @traced
    def shape(self, loss, factor=2.0):
        return self.unit(halve(loss) * factor)

    @staticmethod
    def unit(loss):
        return loss


class DerivedTrainer(ToyTrainer):
    pass


class OtherTrainer(Trainer):
    def shape(self, loss):
        return loss
