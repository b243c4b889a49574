"""The ReDrafter stages: data, training, evaluation."""
