"""Models that run code while they answer: the loop between a server that generates and a sandbox that executes."""
