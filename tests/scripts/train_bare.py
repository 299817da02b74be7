"""A user's own script with neither Trainer nor accelerate: the patches are asked for by hand."""

import torch
from common import arguments, model, rows, write

import sloth_plugins

args = arguments()
network = model(args.model_type)
report = sloth_plugins.patch(network)
print("patched", report.changed)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
data = torch.tensor(rows())
losses = []
for step in range(args.steps):
    batch = data[4 * step : 4 * step + 4]
    loss = network(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
write(args.losses, losses)
