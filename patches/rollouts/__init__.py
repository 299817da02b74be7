"""What patches of TRL's rollouts through vLLM replace: how it starts, and how it gets the weights that are trained."""
