"""Measures of a trained model: retrieval, zero-shot classification, captioning, and the report that shows them."""
