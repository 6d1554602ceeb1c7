"""Annotation files of datasets: from the form in which they are published to that of training."""
