"""The benchmark stage: workload, metrics, answers."""
