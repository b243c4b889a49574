"""Where stages run: the GPUs of this machine, and a Slurm cluster. What the files in profiles/ call."""
