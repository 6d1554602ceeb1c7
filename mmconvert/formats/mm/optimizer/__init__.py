"""The optimizer state that training saves beside the weights: masters, moments, schedule."""
