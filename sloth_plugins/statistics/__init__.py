"""Training statistics: throughput, memory and what goes wrong, in Trainer's own logs, a table and a picture."""
