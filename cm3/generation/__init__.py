"""Sampling of text and pictures from a trained model."""
