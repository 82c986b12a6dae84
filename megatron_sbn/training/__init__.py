"""The parts of the training loop: step, schedule, checkpoint, evaluation."""
