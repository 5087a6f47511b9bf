"""Layers that compute with fewer bits than are trained, and their export."""
