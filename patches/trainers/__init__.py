"""What patches of trainers replace: methods of TRL's trainers, which stay in charge of everything but the logits."""
