"""A user's own script: a loop by hand with Accelerator.prepare."""

import torch
from accelerate import Accelerator
from common import arguments, end, model, rows, write

args = arguments()
accelerator = Accelerator(cpu=True)
network = model(args.model_type)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(torch.tensor(rows()), batch_size=4)
network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
losses = []
for step, batch in enumerate(loader):
    if step == args.steps:
        break
    loss = network(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
write(args.losses, losses)
end(accelerator)
