"""What the machine could do at best: see bench.limits.command."""
