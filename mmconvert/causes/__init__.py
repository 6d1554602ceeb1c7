"""Why whole checkpoints are refused as they stand, and the way out: one place for the words.

Conversions raise what these functions return; ``doctor`` lists it as one finding.
"""
