"""File formats: what is in a checkpoint, and where. No table, no plan, no tensor data."""
