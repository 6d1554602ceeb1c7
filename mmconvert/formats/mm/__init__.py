"""MM checkpoints: rank folders of MindSpeed-MM."""
