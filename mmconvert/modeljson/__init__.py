"""MindSpeed-MM's model.json: read, compared with config.json and checkpoints, and written."""
